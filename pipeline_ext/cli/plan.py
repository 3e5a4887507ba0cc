"""``pipeline-ext plan``: simulates schedules, compares them, and searches for a better one."""

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from .. import _C
from ..base.files import whole_file
from ..base.texts import read_text
from ..errors import InvalidArgument, InvalidSchedule
from ..plan import zero_bubble
from ..plan.build import AUTO, build_plan, check_size, schedule_names
from ..plan.comparison import Planned, planned, searched, simulated, stages_of
from ..plan.costs import Costs, rebatched, recut
from ..plan.search import SearchResult, search
from ..plan.simulation import Simulation
from ..plan.slots import choose_slots
from ..report.page import save_page
from ..report.panel import Panel, percent, simulated_panel
from ..report.timeline import SUFFIXES, accepted_path, save_picture, unit_of
from .plan_options import add_arguments, costs_of
from .plan_table import feasible, show

_SECONDS = 5.0  # for a search that nothing else bounds


def set_up(parser: argparse.ArgumentParser) -> None:
    """Describes the command and adds its options."""
    parser.description = (
        "Simulates schedules with given costs and shows their times and memory. Exit status 0 if "
        "at least one of them is possible, 1 if none, 2 for options that cannot be used."
    )
    parser.set_defaults(run=run)
    add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    names = options.schedule or ([] if options.from_csv else [AUTO])
    _check(options, names)
    results, found = _plan(options, names)
    console = Console(highlight=False, stderr=options.json == "-")
    show(results, found, console)
    if options.noise is not None:
        _show_slots(results, options.noise, console)
    _write(options, results)
    return 0 if any(result.simulation for result in results) else 1


def _check(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises InvalidArgument for options that contradict one another, before anything is planned."""
    for name in names:
        if name not in (AUTO, *schedule_names()):
            raise InvalidArgument(
                f"there is no schedule {name!r}; give {AUTO}, or one of {', '.join(schedule_names())}"
            )
    for flag in ("ranks", "microbatches"):
        if names and getattr(options, flag) is None:
            raise InvalidArgument(f"--{flag} is missing, which {', '.join(names)} needs; give a whole number")
    if names:
        check_size(options.ranks * (options.chunks or 1), max(options.microbatches))
    if options.csv and len(names) + len(options.from_csv) > 1:
        raise InvalidArgument("--csv holds one schedule, and several are given; give one, or leave --csv out")
    if options.png:
        accepted_path(options.png, SUFFIXES)
    if AUTO in names and options.overlap:
        raise InvalidArgument(
            f"--overlap is for named schedules, and {AUTO} searches for ranks that run one task at a time; "
            "leave one of them out"
        )
    if AUTO not in names and len(options.microbatches or [1]) > 1:
        raise InvalidArgument(f"several --microbatches are for a search; give one, or --schedule {AUTO}")
    if not {AUTO, zero_bubble.NAME} & set(names) and (options.budget or options.trials):
        raise InvalidArgument(
            f"--budget and --trials bound a search; give --schedule {AUTO} or {zero_bubble.NAME}, or leave "
            "them out"
        )


def _plan(options: argparse.Namespace, names: Sequence[str]) -> tuple[list[Planned], SearchResult | None]:
    """Plans all schedules; returns them, and the result of the search if there is one."""
    read = [(str(path), _read(path, options.overlap)) for path in options.from_csv]
    plans = {file: plan for file, plan in read if isinstance(plan, _C.Plan)}
    broken = [
        Planned(file, options.ranks, None, None, Costs(), reason=reason)
        for file, reason in read
        if isinstance(reason, str)
    ]
    ranks = _ranks(options, plans.values())
    if ranks is None:
        return broken, None
    own = {name: stages_of(name, ranks, options.chunks or 0) for name in names if name != AUTO}
    stages = _stages_of_costs(options, ranks, {*own.values(), *(plan.num_stages for plan in plans.values())})
    costs = costs_of(options, stages, ranks)
    results = [_named(name, own[name], options, costs, stages, ranks) for name in own]
    results += [simulated(file, plan, recut(costs, stages, plan.num_stages)) for file, plan in plans.items()]
    found = None
    if AUTO in names:
        best, found = _search(options, costs)
        results.append(best)
    return results + broken, found


def _named(
    name: str, num_stages: int, options: argparse.Namespace, costs: Costs, stages_of_costs: int, ranks: int
) -> Planned:
    """Plans a named schedule; for zb-auto without --chunks the better of one and two stages per rank."""
    size = {"num_ranks": ranks, "microbatches": options.microbatches[0], "overlap": options.overlap}
    if name != zero_bubble.NAME:
        return planned(name, num_stages=num_stages, costs=recut(costs, stages_of_costs, num_stages), **size)
    counts = [num_stages] if options.chunks else [num_stages, 2 * ranks]
    found: list[Planned] = []
    for count in counts:
        try:
            cut = recut(costs, stages_of_costs, count)
        except InvalidSchedule:
            if not found:
                raise
            break
        found.append(
            searched(
                num_stages=count,
                costs=cut,
                seconds=(options.budget or math.inf) / len(counts),
                trials=options.trials,
                seed=options.seed,
                **size,
            )
        )
    best, _ = min(feasible(found), key=lambda pair: pair[1].bubble_from_first_start, default=(found[0], None))
    return best


def _read(path: Path, overlap: bool) -> _C.Plan | str:
    """The plan in a file, or why it is not possible."""
    text = read_text("the schedule", path)
    try:
        return _C.plan_of_cells(_C.cells_of_csv(text), overlap=overlap)
    except InvalidSchedule as error:
        return str(error)


def _ranks(options: argparse.Namespace, plans: Iterable[_C.Plan]) -> int | None:
    """The ranks that all schedules have; None without a schedule. Raises InvalidArgument if they differ."""
    found = sorted({plan.num_ranks for plan in plans} | ({options.ranks} - {None}))
    if len(found) > 1:
        counts = " and ".join(map(str, found))
        raise InvalidArgument(f"the schedules have {counts} ranks; compare schedules of one number of ranks")
    return found[0] if found else None


def _stages_of_costs(options: argparse.Namespace, ranks: int, counts: set[int]) -> int:
    """How many stages the given costs describe; ``counts`` are the schedules' numbers of stages."""
    if options.chunks:
        return ranks * options.chunks
    return counts.pop() if len(counts) == 1 and AUTO not in (options.schedule or ()) else ranks


def _search(options: argparse.Namespace, costs: Costs) -> tuple[Planned, SearchResult | None]:
    """The best schedule, or the reason why all are refused."""
    bounded = options.budget or options.trials
    try:
        found = search(
            costs,
            num_ranks=options.ranks,
            chunks=(options.chunks,) if options.chunks else (1, 2),
            microbatches=options.microbatches,
            budget=options.budget if bounded else _SECONDS,
            trials=options.trials,
            seed=options.seed,
        )
    except InvalidSchedule as error:
        return Planned(AUTO, options.ranks, None, None, costs, reason=str(error)), None
    best = found.best
    cut = recut(costs, options.ranks * (options.chunks or 1), best.plan.num_stages)
    cut = rebatched(cut, options.microbatches[0] / best.microbatches)
    result = Planned(
        best.schedule, options.ranks, best.chunks, best.microbatches, cut, best.simulation, chosen=True
    )
    return result, found


def _show_slots(results: Sequence[Planned], noise: float, console: Console) -> None:
    """Prints what more slots bring to each schedule that can run."""
    for result, simulation in feasible(results):
        plan = simulation.plan
        schedule = result.schedule if result.schedule in _C.schedule_names() else plan.order()
        if plan.rank_of_copy or not plan.has_backward:
            continue
        choice = choose_slots(
            lambda room, plan=plan, schedule=schedule, costs=result.costs: build_plan(  # type: ignore[misc]
                schedule,
                num_stages=plan.num_stages,
                num_ranks=plan.num_ranks,
                microbatches=plan.num_microbatches,
                overlap=plan.overlap,
                reactive=True,
                room=room,
                memory=costs,
            ),
            result.costs,
            noise=noise,
        )
        console.print(f"{result.title}, {choice}", markup=False, soft_wrap=True)


def _write(options: argparse.Namespace, results: Sequence[Planned]) -> None:
    """Writes the requested files; --json - to standard output."""
    simulated = feasible(results)
    if options.json:
        values = [result.as_json() for result in results]
        text = json.dumps(values[0] if len(values) == 1 else values) + "\n"
        if options.json == "-":
            print(text, end="")
        else:
            _save(Path(options.json), text)
    if not simulated:
        return
    first, simulation = simulated[0]
    if options.csv:
        _save(options.csv, simulation.plan.to_csv())
    unit = unit_of(first.costs)
    if options.html:
        save_page(options.html, results, unit)
    if options.png:
        save_picture(options.png, [_panel(*pair) for pair in simulated], unit)


def _panel(result: Planned, simulation: Simulation) -> Panel:
    memory = max(simulation.peak_memory)
    return simulated_panel(
        f"{result.title}: bubble {percent(result.bubble)}, peak memory {memory:.6g}", simulation
    )


def _save(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())
