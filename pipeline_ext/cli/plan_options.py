"""The options of ``plan``: schedules, costs, search, and outputs."""

import argparse
from dataclasses import replace
from pathlib import Path

from ..errors import InvalidArgument, InvalidSchedule
from ..plan.build import AUTO, schedule_names
from ..plan.costs import Costs, check_factors
from ..plan.costs_file import BOUNDARY, LISTED_BY, MICROBATCH, RANK
from .numbers import cost, count, count_or_zero, counts, factors, noise, positive, seconds, speed

_COSTS = {  # by field of Costs
    "forward": ("--tf", "time of F, the forward, of one stage (default: 1)"),
    "input_grad": ("--ti", "time of I, the input gradients, of one stage (default: 1)"),
    "weight_grad": ("--tw", "time of W, the weight gradients, of one stage (default: 1); B takes I + W"),
    "pair": ("--pair", "time of an overlapped pair, as a share of F + B (default: 1)"),
    "latency": ("--latency", "latency of a message to another rank (default: 0)"),
    "overhead": ("--overhead", "time that the sender needs per message (default: 0)"),
    "bandwidth": ("--bandwidth", "bytes per unit of time (default: inf)"),
    "message_bytes": ("--message-bytes", "bytes of one microbatch's result (default: 0)"),
    "act_memory": ("--act-memory", "memory that F of one microbatch takes at one stage (default: 1)"),
    "mem_i": ("--mem-i", "part of it that I frees (default: what W does not free, or 0)"),
    "mem_w": ("--mem-w", "part of it that W frees (default: what I does not free)"),
    "memory_limit": ("--memory-limit", "memory that a rank's microbatches may take (default: no limit)"),
}
_TYPES = {"pair": positive, "bandwidth": speed}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all options."""
    add = parser.add_argument_group("what to plan").add_argument
    add(
        "--schedule",
        metavar="NAME,...",
        type=lambda text: text.split(","),
        action="extend",
        help=f"{AUTO}, the default: the best that a search finds; or one of {', '.join(schedule_names())}. "
        "Several, with commas or repeated --schedule, are compared",
    )
    add(
        "--from-csv",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a schedule in the action text of torch.distributed.pipelining, one line per rank",
    )
    add("--ranks", metavar="N", type=count, help="number of ranks; a CSV file has its own")
    add(
        "--chunks",
        metavar="N",
        type=count,
        help="stages per rank that the costs describe. If not given, the schedules' own number, or 1 where "
        "they differ. For a schedule with another number each rank's costs are divided accordingly",
    )
    add(
        "--microbatches",
        metavar="N,...",
        type=counts,
        help="microbatches per step; a CSV file has its own. From several, with commas, a search takes the "
        "best for the same batch. The costs are for the first number, which all other schedules use",
    )
    add(
        "--overlap",
        action="store_true",
        help="run forward and backward of a rank at the same time; not with auto",
    )
    add(
        "--noise",
        metavar="CV",
        type=noise,
        help="coefficient of variation of the times of tasks: shows what more microbatches in flight bring to "
        "ranks that react, within --memory-limit",
    )

    add = parser.add_argument_group(
        "costs",
        "Times, bytes and memory, each in a unit of your choice. A number, or a list such as 1,2,1: one for "
        "each stage, boundary between stages (--latency to --message-bytes) or rank (--memory-limit).",
    ).add_argument
    for field, (flag, help) in _COSTS.items():
        add(flag, dest=field, metavar="X", type=_TYPES.get(field, cost), help=help)
    add(
        "--microbatch-factors",
        dest=MICROBATCH,
        metavar="X,...",
        type=factors,
        help="factors on the times of unequal microbatches, one for each (default: 1)",
    )
    add(
        "--costs",
        metavar="FILE",
        help="JSON file of costs, as pipe.profile().save(FILE) writes it; other options override it",
    )

    add = parser.add_argument_group(f"search, with --schedule {AUTO} or zb-auto").add_argument
    add(
        "--budget",
        metavar="TIME",
        type=seconds,
        help="time to search: 500ms, 5s, 1m (default of auto without --trials: 5s)",
    )
    add(
        "--trials",
        metavar="N",
        type=count,
        help="number of plans to try; without --budget one seed gives the same result",
    )
    add("--seed", metavar="N", type=count_or_zero, default=0, help="seed of the search (default: 0)")

    add = parser.add_argument_group("outputs, besides the table").add_argument
    add(
        "--json",
        metavar="FILE",
        help="figures and orders; - for standard output, with the table on standard error",
    )
    add("--csv", metavar="FILE", type=Path, help="the order of one schedule, one line per rank")
    add("--png", metavar="FILE", type=Path, help="timelines, also as .svg or .pdf; needs matplotlib")
    add("--html", metavar="FILE", type=Path, help="timelines to zoom into; one self-contained page")


def costs_of(options: argparse.Namespace, num_stages: int, num_ranks: int) -> Costs:
    """The given costs, for this many stages and ranks.

    Raises InvalidArgument if a list has another length, or frees more memory than was taken.
    """
    costs = Costs(input_grad=1.0, weight_grad=1.0) if options.costs is None else Costs.load(options.costs)
    given = {field: value for field in (*_COSTS, MICROBATCH) if (value := getattr(options, field)) is not None}
    costs = replace(costs, **given)
    counts: dict[str | None, int] = {BOUNDARY: num_stages - 1, RANK: num_ranks}
    try:
        check_factors(costs, num_stages, options.microbatches[0] if options.microbatches else None)
    except InvalidSchedule as error:
        name = "--microbatch-factors" if MICROBATCH in given else f"{MICROBATCH!r} in {options.costs!r}"
        raise InvalidArgument(str(error).replace(MICROBATCH, name, 1)) from None
    for field, place in LISTED_BY.items():
        value, expected = getattr(costs, field), counts.get(place, num_stages)
        if field != MICROBATCH and isinstance(value, list) and len(value) != expected:
            name = _COSTS[field][0] if field in given else f"{field!r} in {options.costs!r}"
            raise InvalidArgument(
                f"{name} has {len(value)} entries; give one number, or {place}: {expected} with {num_stages} "
                f"stages on {num_ranks} ranks"
            )
    if "input_grad" in given or "weight_grad" in given:
        times = costs.times(num_stages)
        costs = replace(
            costs,
            backward=[i + w for i, w in zip(times["I"], times["W"])],
            input_grad=times["I"],
            weight_grad=times["W"],
        )
    costs.by_stage(num_stages, num_ranks)
    return costs
