"""Writes simulated schedules as one web page, with timelines to zoom into. The page loads nothing."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..base.files import whole_file
from ..plan.comparison import Planned
from ..plan.records import lanes, task_records
from .colors import COLORS, NAMES, paleness
from .memory_curve import memory_curve
from .panel import percent


def save_page(path: Path, results: Sequence[Planned], unit: str) -> None:
    """Writes the page: the schedules below one another on one time axis, in ``unit``.

    Raises PipelineError if the file cannot be written.
    """
    schedules = [_schedule(result) for result in results]
    kinds = {task[0] for schedule in schedules for task in schedule.get("tasks", ())}
    memory = [amount for s in schedules for curve in s.get("memory", ()) for _, amount in curve]
    data = {
        "unit": unit,
        "colors": COLORS,
        "names": {kind: name for kind, name in NAMES.items() if kind in kinds},
        "most": max(memory, default=0.0),
        "schedules": schedules,
    }
    page = resources.files(__package__).joinpath("page.html").read_text()
    title = ", ".join(result.title for result in results)
    text = json.dumps(data, separators=(",", ":")).replace(
        "<", r"\u003c"
    )  # so that no text in it ends the script
    with whole_file(path) as file:
        file.write(page.replace("TITLE", _escaped(title)).replace("DATA", text).encode())


def _schedule(result: Planned) -> dict[str, Any]:
    if result.simulation is None:
        return {"title": result.title, "figures": result.reason}
    simulation = result.simulation
    plan = simulation.plan
    tasks = [t for t in task_records(plan, simulation.begin, simulation.end) if t.kind in COLORS]
    bound = "" if result.lower_bound is None else f", not below {result.lower_bound:.6g}"
    curves = memory_curve(tasks, result.costs, plan.num_stages)
    return {
        "title": result.title,
        "figures": (
            f"makespan {simulation.makespan:.6g}{bound}; bubble {percent(result.bubble)}; "
            f"up to {max(simulation.peak_in_flight)} microbatches in flight, memory "
            f"{max(simulation.peak_memory):.6g}; {plan.num_messages} messages"
        ),
        "ranks": plan.num_ranks,
        "makespan": simulation.makespan,
        "shade": paleness(plan.rank_of_stage),
        "tasks": [
            (t.kind, t.stage, t.microbatch, t.rank, lane, _short(t.begin), _short(t.end))
            for t, lane in zip(tasks, lanes(plan, tasks), strict=True)
        ],
        "memory": [
            [(_short(time), _short(amount)) for time, amount in curves.get(rank, ())]
            for rank in range(plan.num_ranks)
        ],
    }


def _short(number: float) -> float:
    return float(f"{number:.9g}")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
