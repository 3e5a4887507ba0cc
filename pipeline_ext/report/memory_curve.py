"""The memory that the microbatches of a rank take in the course of a step."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

from ..plan.costs import Costs
from ..plan.records import TaskRecord


def memory_curve(
    tasks: Sequence[TaskRecord], costs: Costs, num_stages: int
) -> dict[int, list[tuple[float, float]]]:
    """Rank -> the times at which the memory of its microbatches changes, each with the memory from then on.

    Memory is in the unit of the costs. ``tasks`` are of a plan with ``num_stages`` stages.
    """
    taken, freed = costs.memory(num_stages)
    split = {(task.stage, task.microbatch) for task in tasks if task.kind == "I"}
    changes: dict[int, dict[float, float]] = {task.rank: defaultdict(float) for task in tasks}
    for task in tasks:
        if task.kind == "F":
            changes[task.rank][task.begin] += taken[task.stage]
        elif task.kind == "I" and freed[task.stage]:
            changes[task.rank][task.end] -= freed[task.stage]
        elif task.kind in ("B", "W"):
            by_i = freed[task.stage] if (task.stage, task.microbatch) in split else 0.0
            changes[task.rank][task.end] -= taken[task.stage] - by_i
    return {
        rank: list(zip(times := sorted(of_rank), accumulate(of_rank[time] for time in times)))
        for rank, of_rank in changes.items()
    }
