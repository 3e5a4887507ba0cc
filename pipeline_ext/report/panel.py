"""One timeline of a picture."""

from collections.abc import Sequence
from dataclasses import dataclass

from .. import _C
from ..plan.records import TaskRecord, task_records
from ..plan.simulation import Simulation


@dataclass(frozen=True)
class Panel:
    """One timeline of a picture. All times are in one unit, and count from zero."""

    title: str
    plan: _C.Plan  # the plan of the tasks
    tasks: Sequence[TaskRecord]
    makespan: float
    bubble_by_rank: Sequence[float]


def simulated_panel(title: str, simulation: Simulation) -> Panel:
    """The panel of a simulated plan."""
    plan = simulation.plan
    tasks = task_records(plan, simulation.begin, simulation.end)
    return Panel(title, plan, tasks, simulation.makespan, simulation.bubble_by_rank)


def percent(share: float) -> str:
    """The text of a bubble, as in ``12.5 %``."""
    return f"{100 * max(0.0, share):.1f} %"  # rounding may leave slightly less than 0
