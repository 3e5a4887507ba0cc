"""Factors on the times of unequal microbatches: one each; or one at each stage; or one of each kind there."""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

from ..errors import InvalidArgument

Factors: TypeAlias = Sequence[float] | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]

KINDS = "FBIW"  # the order of the four factors of a microbatch at a stage
_ACCEPTED = (
    "give one factor for each microbatch, or a list of such lists, one for each stage, with a factor or four, "
    "for F, B, I and W, for each microbatch"
)


def checked(name: str, factors: Any) -> Any:
    """``factors`` as lists of floats. Raises InvalidArgument, which calls them ``name``."""
    found = factors.tolist() if hasattr(factors, "tolist") else factors  # an array or a tensor
    rows = [found]
    for level in range(3):
        if not all(map(_is_list, rows)):
            raise InvalidArgument(f"{name} is {_shown(factors)}; {_ACCEPTED}")
        lengths = {len(row) for row in rows}
        if len(lengths) != 1 or 0 in lengths or (level == 2 and lengths != {len(KINDS)}):
            counts = ", ".join(map(str, sorted(lengths)[:4]))
            raise InvalidArgument(f"{name} has lists of length {counts}; {_ACCEPTED}")
        if not any(_is_list(value) for row in rows for value in row):
            return _numbers(name, found, level)
        rows = [value for row in rows for value in row]
    raise InvalidArgument(f"{name} is {_shown(factors)}; {_ACCEPTED}")


def num_stages(factors: Factors) -> int | None:
    """The number of stages that have lists of their own; None: all have the same."""
    return len(factors) if _levels(factors) > 0 else None


def num_microbatches(factors: Any) -> int:
    """The number of microbatches."""
    return len(factors[0]) if _levels(factors) > 0 else len(factors)


def of(factors: Any, stage: int, kind: str, microbatch: int) -> float:
    """One factor."""
    levels = _levels(factors)
    if levels == 0:
        return factors[microbatch]
    of_microbatch = factors[stage][microbatch]
    return of_microbatch[KINDS.index(kind)] if levels == 2 else of_microbatch


def flat(factors: Any) -> tuple[list[float], tuple[int, int, int]]:
    """All factors by stage, microbatch and kind, and their numbers, as ``_C.CostsByStage`` takes them."""
    levels = _levels(factors)
    shape = (num_stages(factors) or 1, num_microbatches(factors), len(KINDS) if levels == 2 else 1)
    values = factors
    for _ in range(levels):
        values = [value for row in values for value in row]
    return list(values), shape


def reordered(factors: Any, order: Sequence[int]) -> Any:
    """The factors of a step whose microbatch i is microbatch ``order[i]`` of this one."""
    if _levels(factors) > 0:
        return [[row[m] for m in order] for row in factors]
    return [factors[m] for m in order]


def recut(factors: Any, times: Mapping[str, Sequence[float]], stages: int, wanted: int) -> Any:
    """The factors of a model cut into ``wanted`` stages, from those of the same model cut into ``stages``.

    ``times``: of the stages, by kind. A part of a stage takes its share of the stage's time, so a new stage's
    factor is the mean of its parts' weighted by their times.
    """
    if _levels(factors) == 0:
        return factors
    cut = []
    for parts in _parts(stages, wanted):
        weights = {kind: [share * times[kind][s] for s, share in parts] for kind in KINDS}
        cut.append(
            [
                [_mean([of(factors, s, kind, m) for s, _ in parts], weights[kind]) for kind in KINDS]
                for m in range(num_microbatches(factors))
            ]
        )
    return cut


def rebatched(factors: Any, factor: float) -> Any:
    """The factors of the same batch cut into microbatches of ``factor`` times as many rows."""
    microbatches = num_microbatches(factors)
    parts = list(_parts(microbatches, max(1, round(microbatches / factor))))
    shares = [[share for _, share in part] for part in parts]

    def row(values: Any, kind: str = "F") -> list[float]:
        return [
            _mean([of(values, 0, kind, m) for m, _ in part], weights) for part, weights in zip(parts, shares)
        ]

    levels = _levels(factors)
    if levels == 0:
        return row(factors)
    if levels == 1:
        return [row(values) for values in factors]
    return [[list(four) for four in zip(*(row([values], kind) for kind in KINDS))] for values in factors]


def _parts(count: int, wanted: int) -> Iterator[list[tuple[int, float]]]:
    """For each of ``wanted`` equal parts of ``count`` things: the things it covers, and how much of each."""
    length = count / wanted
    for i in range(wanted):
        begin, end = i * length, (i + 1) * length
        first, last = min(int(begin), count - 1), min(math.ceil(end), count)
        yield [(n, max(0.0, min(end, n + 1) - max(begin, n))) for n in range(first, max(last, first + 1))]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    if total == 0:
        return sum(values) / len(values)
    return sum(value * weight for value, weight in zip(values, weights)) / total


def _levels(factors: Any) -> int:
    """0 for a list of factors, 1 for one by stage, 2 for one by kind too."""
    if not isinstance(factors[0], list):
        return 0
    return 2 if isinstance(factors[0][0], list) else 1


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _numbers(name: str, values: Any, levels: int) -> Any:
    if levels > 0:
        return [_numbers(name, row, levels - 1) for row in values]
    return [_number(name, value) for value in values]


def _number(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise InvalidArgument(f"{name} holds {_shown(value)}; a factor is a finite number of at least 0")
    return number


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except (RecursionError, ValueError):  # lists in lists; a number of thousands of digits
        return f"a {type(value).__name__}"
