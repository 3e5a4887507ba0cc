"""The table of ``plan``: figures of each schedule; with a single schedule also of each rank."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..plan.comparison import Planned
from ..plan.search import SearchResult
from ..plan.simulation import Simulation
from ..report.panel import percent

_WIDTH = 112  # without a terminal
_MOST_ROWS = 64  # of the table of ranks


Feasible = tuple[Planned, Simulation]


def feasible(results: Sequence[Planned]) -> list[Feasible]:
    """The plans that can run, each with its simulation."""
    return [(result, result.simulation) for result in results if result.simulation is not None]


def show(results: Sequence[Planned], found: SearchResult | None, console: Console) -> None:
    """Prints the table, the result of the search, and why schedules are refused."""
    if not console.is_terminal:
        console.width = _WIDTH
    simulated = feasible(results)
    if simulated:
        console.print(_schedules(simulated))
    if len(simulated) == len(results) == 1:
        console.print(_ranks(simulated[0][1]))
    if found is not None:
        console.print(_tried(found))
        console.print(_searched(found), markup=False, soft_wrap=True)
    for result in results:
        if result.reason is not None:
            console.print(f"{result.title} is not possible: {result.reason}", markup=False, soft_wrap=True)


def _schedules(results: Sequence[Feasible]) -> Table:
    table = _table(
        "schedule", "chunks", "M", "makespan", "not below", "bubble", "from first start", "in flight", "memory",
        "messages",
    )  # fmt: skip
    for result, simulation in results:
        table.add_row(
            escape(result.title),
            str(result.chunks),
            str(result.microbatches),
            _figure(simulation.makespan),
            "-" if result.lower_bound is None else _figure(result.lower_bound),
            percent(result.bubble),
            percent(simulation.bubble_from_first_start),
            str(max(simulation.peak_in_flight)),
            _figure(max(simulation.peak_memory)),
            str(simulation.plan.num_messages),
        )
    return table


def _ranks(simulation: Simulation) -> Table:
    table = _table("rank", "stages", "bubble", "in flight", "memory")
    plan = simulation.plan
    stages: list[list[str]] = [[] for _ in range(plan.num_ranks)]
    for ranks in (plan.rank_of_stage, plan.rank_of_copy):
        for stage, rank in enumerate(ranks):
            stages[rank].append(str(stage))
    for rank in range(min(plan.num_ranks, _MOST_ROWS)):
        table.add_row(
            str(rank),
            ", ".join(stages[rank][:_MOST_ROWS]),
            percent(simulation.bubble_by_rank[rank]),
            str(simulation.peak_in_flight[rank]),
            _figure(simulation.peak_memory[rank]),
        )
    if plan.num_ranks > _MOST_ROWS:
        table.add_row(f"and {plan.num_ranks - _MOST_ROWS} more")
    return table


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _tried(found: SearchResult) -> Table:
    """The best plan of each kind, the shortest first."""
    best: dict[tuple[str, int, int], float] = {}
    for tried in found.tried:
        kind = tried.what, tried.chunks, tried.microbatches
        time = math.inf if tried.makespan is None else tried.makespan
        best[kind] = min(time, best.get(kind, math.inf))
    table = _table("tried", "chunks", "M", "makespan")
    for kind, time in sorted(best.items(), key=lambda item: item[1]):
        table.add_row(*map(str, kind), _figure(time) if time < math.inf else "not possible")
    return table


def _searched(found: SearchResult) -> str:
    best = found.best
    above = best.simulation.makespan / found.lower_bound - 1.0 if found.lower_bound > 0 else 0.0
    stopped = ", until it was stopped" if found.interrupted else ""
    return (
        f"auto: {best.schedule} is the best of {found.simulations} simulated plans in {found.seconds:.1f} s"
        f"{stopped}; none can be shorter than {_figure(found.lower_bound)}, and it is {percent(above)} above"
    )


def _figure(number: float) -> str:
    return f"{number:.6g}"
