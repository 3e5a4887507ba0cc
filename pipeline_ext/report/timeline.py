"""The timeline picture of a plan: what it promises and, below it, what a step did."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import _C
from ..errors import InvalidArgument, PipelineError
from ..files import whole_file
from ..simulation import Costs, Simulation, simulate
from .records import TaskRecord, task_records

SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Panel:
    """One timeline of a picture. Times are in one unit; ``makespan`` counts from zero too."""

    title: str
    tasks: Sequence[TaskRecord]
    makespan: float
    bubble_by_rank: Sequence[float]

    @property
    def bubble(self) -> float:
        """Mean over the ranks."""
        return statistics.fmean(self.bubble_by_rank)


def simulated_panel(title: str, simulation: Simulation) -> Panel:
    """The panel of a simulated plan."""
    tasks = task_records(simulation.plan, simulation.begin, simulation.end)
    return Panel(title, tasks, simulation.makespan, simulation.bubble_by_rank)


def draw_plan(plan: _C.Plan, path: str | os.PathLike, costs: Costs | None = None) -> None:
    """``Plan.draw``."""
    path = accepted_path(path, SUFFIXES)
    costs = Costs() if costs is None else costs
    if not isinstance(costs, Costs):
        raise InvalidArgument(f"costs is {costs!r}; give pipeline_ext.Costs(forward=..., backward=...)")
    panel = simulated_panel("Plan, simulated", simulate(plan, costs))
    unit = "F = 1" if isinstance(costs.forward, (int, float)) and costs.forward == 1 else "unit of the costs"
    save_picture(path, plan, [panel], unit)


def accepted_path(path: str | os.PathLike, suffixes: Sequence[str]) -> Path:
    """``path``, whose suffix, in lower or upper case, is one of ``suffixes``.

    Raises InvalidArgument for anything else.
    """
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix.lower() not in suffixes:
        *others, last = suffixes
        raise InvalidArgument(
            f"the path is {str(path)!r}; give one that ends in {', '.join(others)} or {last}"
        )
    return Path(path)


def save_picture(
    path: Path, plan: _C.Plan, panels: Sequence[Panel], unit: str, units: float = 1.0
) -> None:
    """Draws the panels above one another, on one time axis.

    Args:
        path: where to; ends in one of ``SUFFIXES``.
        plan: what the panels' tasks belong to.
        panels: one or more.
        unit: what the axis counts in.
        units: how many of it make up one of the panels' times.

    Raises PipelineError without matplotlib, or where the file cannot be written.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PipelineError(
            'a timeline picture needs matplotlib; install it with pip install "pipeline_ext[plot]"'
        ) from error
    from . import picture

    with picture.style():
        figure = picture.figure(plan, panels, unit, units)
        with whole_file(path) as file:
            figure.savefig(file, format=path.suffix.lower()[1:], dpi=200)
