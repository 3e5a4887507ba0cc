"""Which rows go into which microbatch, so that the work of the microbatches is even."""

import heapq
import sys
from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

from ..base import arguments
from ..errors import InvalidArgument

_EXCHANGES = 100  # at most
_EVEN = 1.001  # times the work that no microbatch can stay below: good enough
_WORTH = 1e-9  # what an exchange saves at least, as a share: more than rounding

_Row = tuple[float, int]  # its work and its index


def balanced_microbatches(
    lengths: Sequence[int] | Any, microbatches: int, *, linear: float = 1.0, quadratic: float = 0.0
) -> list[list[int]]:
    """Divides the rows of a batch into microbatches whose work is as even as a short search finds.

    The work of a row is ``linear * length + quadratic * length**2``, that of a microbatch the sum over its
    rows. The rows go to the microbatch with the least work so far, those with the most work first: the fullest
    microbatch then has at most 4/3 - 1/(3M) times the work that it has in the best division (Graham, Bounds on
    Multiprocessing Timing Anomalies, SIAM J. Appl. Math. 17, 1969). Moves and swaps of single rows between the
    fullest and others follow, at most 100, each of which makes these two more even. The result depends on the
    arguments alone.

    Example::

        parts = pe.balanced_microbatches(lengths, 8, quadratic=1 / 4096)
        loss = pipe.step(arg_mbs=[(x[rows],) for rows in parts], target_mbs=[y[rows] for rows in parts])

    Args:
        lengths: the tokens of each row, a list or a tensor of one dimension; or what else the work grows with.
        microbatches: M.
        linear, quadratic: the work of a token, and of a pair of tokens of one row (attention). Only their ratio
            matters. ``FittedCosts`` has both.

    Returns:
        M lists of indices of rows. Each row is in one of them, and none is empty. The indices ascend in each
        list, and so do the lists' first indices.

    Raises InvalidArgument for lengths that are no whole numbers of at least 0, fewer rows than microbatches,
    and factors that are negative, not finite or both 0.
    """
    found = arguments.sizes("lengths", lengths)
    count = arguments.count("microbatches", microbatches)
    if len(found) < count:
        raise InvalidArgument(
            f"lengths has {len(found)} rows, too few for {count} microbatches, each of which takes at least "
            "one; give a larger batch or fewer microbatches"
        )
    for name, factor in (("linear", linear), ("quadratic", quadratic)):
        arguments.check_between(name, factor, 0, sys.float_info.max)
    larger = max(linear, quadratic)
    if larger == 0:
        raise InvalidArgument("linear and quadratic are both 0, so that no row has work; give one above 0")
    rows = [
        (linear / larger * length + quadratic / larger * length**2, row) for row, length in enumerate(found)
    ]
    parts = _longest_first(rows, count)
    _exchange(parts)
    return sorted(sorted(row for _, row in part) for part in parts)


def _longest_first(rows: Sequence[_Row], count: int) -> list[list[_Row]]:
    """Gives each row to the microbatch with the least work, of several to that with the fewest rows."""
    parts: list[list[_Row]] = [[] for _ in range(count)]
    least = [(0.0, 0, m) for m in range(count)]
    for work, row in sorted(rows, key=lambda row: -row[0]):
        total, size, m = least[0]
        parts[m].append((work, row))
        heapq.heapreplace(least, (total + work, size + 1, m))
    return parts


def _exchange(parts: list[list[_Row]]) -> None:
    """Moves and swaps rows between the fullest microbatch and others, while that makes it less full."""
    for part in parts:
        part.sort()
    works = [sum(work for work, _ in part) for part in parts]
    longest = max(part[-1][0] for part in parts)
    even = _EVEN * max(longest, sum(works) / len(parts))
    for _ in range(_EXCHANGES):
        fullest = max(range(len(parts)), key=works.__getitem__)
        found = _best_exchange(parts, works, fullest) if works[fullest] > even else None
        if found is None:
            return
        other, given, taken = found
        parts[fullest].remove(given)
        insort(parts[other], given)
        if taken is not None:
            parts[other].remove(taken)
            insort(parts[fullest], taken)
        for m in (fullest, other):
            works[m] = sum(work for work, _ in parts[m])


def _best_exchange(
    parts: list[list[_Row]], works: list[float], fullest: int
) -> tuple[int, _Row, _Row | None] | None:
    """With which other microbatch, what to give it, and what to take for it; None if nothing helps.

    Of two microbatches that differ by ``gap``, an exchange that passes on the work w leaves the fuller one with
    ``min(w, gap - w)`` less: the best w is half of the gap.
    """
    found = None
    saved = _WORTH * works[fullest]
    for other in sorted(range(len(parts)), key=works.__getitem__):
        gap = works[fullest] - works[other]
        if gap / 2 <= saved:
            break
        takes: list[tuple[float, int]] = [(0.0, -1), *parts[other]]  # -1: nothing
        for given in parts[fullest]:
            near = bisect_left(takes, (given[0] - gap / 2, -1))
            for taken in takes[max(near - 1, 0) : near + 1]:
                passed = given[0] - taken[0]
                if min(passed, gap - passed) > saved:
                    saved = min(passed, gap - passed)
                    found = other, given, taken if taken[1] >= 0 else None
    return found
