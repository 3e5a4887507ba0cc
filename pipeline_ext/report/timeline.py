"""Draws a plan as a timeline picture: its simulation, and below it a measured step if there is one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import _C
from ..base.files import whole_file
from ..errors import InvalidArgument, PipelineError
from ..plan.costs import Costs
from ..plan.simulation import simulate
from .panel import Panel, percent, simulated_panel

SUFFIXES = (".png", ".svg", ".pdf")


def draw_plan(plan: _C.Plan, path: str | os.PathLike, costs: Costs | None = None) -> None:
    """``Plan.draw``."""
    file = accepted_path(path, SUFFIXES)
    costs = Costs() if costs is None else costs
    if not isinstance(costs, Costs):
        raise InvalidArgument(f"costs is {costs!r}; give pipeline_ext.Costs(forward=..., backward=...)")
    simulation = simulate(plan, costs)
    panel = simulated_panel(f"Plan, simulated: bubble {percent(simulation.bubble)}", simulation)
    save_picture(file, [panel], unit_of(costs))


def unit_of(costs: Costs) -> str:
    """The unit of the time axis, as far as the costs tell it."""
    equal = isinstance(costs.forward, (int, float)) and costs.microbatch is None
    return "F = 1" if equal and costs.forward == 1 else "unit of the costs"


def accepted_path(path: Any, suffixes: Sequence[str]) -> Path:
    """``path`` if it ends in one of ``suffixes``, in lower or upper case. Raises InvalidArgument otherwise."""
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix.lower() not in suffixes:
        *others, last = suffixes
        raise InvalidArgument(f"the path is {str(path)!r}; give one that ends in {', '.join(others)} or {last}")
    return Path(path)


def save_picture(path: Path, panels: Sequence[Panel], unit: str, units: float = 1.0) -> None:
    """Draws the panels above one another, on one time axis.

    Args:
        path: the file to write; ends in one of ``SUFFIXES``.
        panels: one or more.
        unit: name of the unit of the time axis.
        units: this many of it are one unit of the panels' times.

    Raises PipelineError without matplotlib, or if the file cannot be written.
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
