"""The timeline picture of a plan: what it promises and, below it, what a step did."""

import os
from collections.abc import Sequence
from pathlib import Path

from .. import _C
from ..base.files import whole_file
from ..errors import InvalidArgument, PipelineError
from ..plan.simulation import Costs, simulate
from .panel import Panel, percent, simulated_panel

SUFFIXES = (".png", ".svg", ".pdf")


def draw_plan(plan: _C.Plan, path: str | os.PathLike, costs: Costs | None = None) -> None:
    """Draws the plan's simulated timeline; the path ends in .png, .svg or .pdf.

    ``costs`` are pipeline_ext.Costs, by default F = 1 and B = 2 at every stage. Makes the folders that the path
    needs. Raises InvalidArgument for another suffix, InvalidSchedule for costs that do not fit, and PipelineError
    without matplotlib or if the file cannot be written.
    """
    path = accepted_path(path, SUFFIXES)
    costs = Costs() if costs is None else costs
    if not isinstance(costs, Costs):
        raise InvalidArgument(f"costs is {costs!r}; give pipeline_ext.Costs(forward=..., backward=...)")
    simulation = simulate(plan, costs)
    panel = simulated_panel(f"Plan, simulated: bubble {percent(simulation.bubble)}", simulation)
    save_picture(path, [panel], unit_of(costs))


def unit_of(costs: Costs) -> str:
    """What a time axis counts in, as far as the costs tell."""
    return "F = 1" if isinstance(costs.forward, (int, float)) and costs.forward == 1 else "unit of the costs"


def accepted_path(path: str | os.PathLike, suffixes: Sequence[str]) -> Path:
    """``path``, whose suffix, in lower or upper case, is one of ``suffixes``.

    Raises InvalidArgument for anything else.
    """
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix.lower() not in suffixes:
        *others, last = suffixes
        raise InvalidArgument(f"the path is {str(path)!r}; give one that ends in {', '.join(others)} or {last}")
    return Path(path)


def save_picture(path: Path, panels: Sequence[Panel], unit: str, units: float = 1.0) -> None:
    """Draws the panels above one another, on one time axis.

    Args:
        path: where to; ends in one of ``SUFFIXES``.
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
        figure = picture.figure(panels, unit, units)
        with whole_file(path) as file:
            figure.savefig(file, format=path.suffix.lower()[1:], dpi=200)
