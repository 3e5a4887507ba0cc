"""``"zb-auto"``: searches for an order of F, I and W with the least idle time that the memory allows.

The search varies the policies by which ranks choose under a virtual clock, then the orders themselves, by
simulated annealing. That weight gradients can fill the time in which a rank would wait is from Qi et al., Zero
Bubble Pipeline Parallelism, ICLR 2024.
"""

import math
import os
from collections.abc import Sequence
from typing import NamedTuple

from .. import _C
from ..errors import InvalidSchedule
from .costs import Costs

NAME = "zb-auto"
WORK = 100_000_000  # tasks that a search places if it has no other limit
_MOST_THREADS = 4


class FoundOrder(NamedTuple):
    """The result of a search.

    Attributes:
        cells: each rank's actions as text.
        time: the time that the search minimised, in the unit of the costs.
        trials: number of orders simulated.
        interrupted: whether Ctrl-C ended it.
    """

    cells: list[list[str]]
    time: float
    trials: int
    interrupted: bool


def num_tasks(num_stages: int, microbatches: int) -> int:
    """Number of tasks ``F``, ``I`` and ``W`` of a step: the work of one trial."""
    return 3 * num_stages * microbatches


def layout(num_stages: int, num_ranks: int) -> str:
    """How stages are placed: one on each rank, two in V shape, more looped. Raises InvalidSchedule."""
    if num_stages % num_ranks or num_stages < num_ranks:
        raise InvalidSchedule(
            f"'{NAME}' holds the same number of stages on each rank, got {num_stages} stages on "
            f"{num_ranks} ranks"
        )
    return {1: "linear", 2: "v"}.get(num_stages // num_ranks, "looped")


def rank_of_stage(num_stages: int, num_ranks: int) -> list[int]:
    """The rank of each stage in that layout."""
    if layout(num_stages, num_ranks) == "v":
        return [min(s, num_stages - 1 - s) for s in range(num_stages)]
    return [s % num_ranks for s in range(num_stages)]


def find_order(
    costs: Costs,
    *,
    num_stages: int,
    num_ranks: int,
    microbatches: int,
    span: bool,
    work: int = WORK,
    seconds: float = math.inf,
    seed: int = 0,
) -> FoundOrder:
    """The best order of ``F``, ``I`` and ``W`` that a search finds within ``costs.memory_limit``.

    Args:
        costs: costs of tasks, links and memory.
        num_stages, num_ranks, microbatches: their numbers.
        span: minimise the longest span, over ranks, from a rank's own first task to the end of its last one, as
            published zero-bubble figures count; otherwise the time until the last rank ends.
        work: tasks to place, on all threads together. A search with no other limit finds the same order for the
            same seed.
        seconds: time limit; the search ends with the best so far.
        seed: seed of the random numbers, at least 0.

    Raises InvalidSchedule for costs or stages that do not fit, or if no order keeps the memory limit.
    """
    home = rank_of_stage(num_stages, num_ranks)
    by_stage = costs.by_stage(num_stages, num_ranks)
    return FoundOrder(
        *_C.search_zero_bubble(
            home,
            num_ranks,
            microbatches,
            by_stage,
            span=span,
            templates=_templates(num_stages, num_ranks, microbatches),
            work=work,
            seconds=seconds,
            seed=seed,
            threads=min(_MOST_THREADS, len(os.sched_getaffinity(0))),
        )
    )


def _templates(num_stages: int, num_ranks: int, microbatches: int) -> list[Sequence[Sequence[str]]]:
    """The orders of the named schedules with this placement."""
    wanted = layout(num_stages, num_ranks)
    return [
        list(_C.make_plan(name, num_stages, num_ranks, microbatches).order().values())
        for name in _C.schedule_names()
        if _C.layout_of(name) == wanted
    ]
