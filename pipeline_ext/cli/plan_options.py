"""The options of ``plan``: what is to be planned, at which costs, and where to write it."""

import argparse
from dataclasses import replace
from pathlib import Path

from ..errors import InvalidArgument
from ..plan.build import AUTO, schedule_names
from ..plan.costs import Costs
from ..plan.costs_file import BOUNDARY, LISTED_BY, RANK
from .numbers import cost, count, count_or_zero, counts, positive, seconds, speed

_COSTS = {  # by field of Costs
    "forward": ("--tf", "time of F of one stage (default: 1)"),
    "input_grad": ("--ti", "time of I, the input gradients, of one stage (default: 1)"),
    "weight_grad": ("--tw", "time of W, the weight gradients, of one stage (default: 1); B takes I + W"),
    "pair": ("--pair", "time of an overlapped pair, as a share of its F + B (default: 1)"),
    "latency": ("--latency", "time of a message on its way to another rank (default: 0)"),
    "overhead": ("--overhead", "time that a message takes its sender (default: 0)"),
    "bandwidth": ("--bandwidth", "bytes in a unit of time (default: inf)"),
    "message_bytes": ("--message-bytes", "bytes of one microbatch's result (default: 0)"),
    "act_memory": ("--act-memory", "memory that F of a microbatch takes at one stage (default: 1)"),
    "mem_i": ("--mem-i", "what I frees of it (default: what W leaves, or nothing)"),
    "mem_w": ("--mem-w", "what W frees of it (default: what I leaves)"),
    "memory_limit": ("--memory-limit", "memory that a rank's microbatches may take (default: any)"),
}
_TYPES = {"pair": positive, "bandwidth": speed}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all of them."""
    add = parser.add_argument_group("what to plan").add_argument
    add(
        "--schedule",
        metavar="NAME,...",
        type=lambda text: text.split(","),
        action="extend",
        help=f"{AUTO}, the default: the best that a search finds; or one of {', '.join(schedule_names())}. "
        "Several, with commas or by several --schedule, are compared",
    )
    add(
        "--from-csv",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="a schedule in the action text of torch.distributed.pipelining; a line for each rank",
    )
    add("--ranks", metavar="N", type=count, help="ranks; a CSV file has its own")
    add(
        "--chunks",
        metavar="N",
        type=count,
        help="stages on each rank, whose times and memory the costs are. Not given: what the schedules take, "
        "1 where they differ. A schedule that takes another number has its ranks' shares cut accordingly",
    )
    add(
        "--microbatches",
        metavar="N,...",
        type=counts,
        help="microbatches of a step; a CSV file has its own. Of several, with commas, a search takes the best "
        "for one batch; the costs are for the first, which all other schedules have",
    )
    add("--overlap", action="store_true", help="let a rank run forward and backward at once; not with auto")

    add = parser.add_argument_group(
        "costs",
        "Times, bytes and memory in any one unit each. A number, or a list as in 1,2,1: one for each stage, "
        "boundary between stages (--latency to --message-bytes) or rank (--memory-limit).",
    ).add_argument
    for field, (flag, help) in _COSTS.items():
        add(flag, dest=field, metavar="X", type=_TYPES.get(field, cost), help=help)
    add(
        "--costs",
        metavar="FILE",
        help="JSON file of costs, as pipe.profile().save(FILE) writes it; options given beside it win",
    )

    add = parser.add_argument_group(f"search, with --schedule {AUTO} or zb-auto").add_argument
    add("--budget", metavar="TIME", type=seconds, help="500ms, 5s, 1m (default: 5s, without --trials)")
    add("--trials", metavar="N", type=count, help="plans to try; without --budget the same ones for a seed")
    add("--seed", metavar="N", type=count_or_zero, default=0, help="of its choices (default: 0)")

    add = parser.add_argument_group("outputs, besides the table").add_argument
    add("--json", metavar="FILE", help="figures and orders; -: to standard output, the table to standard error")
    add("--csv", metavar="FILE", type=Path, help="the order of one schedule, a line for each rank")
    add("--png", metavar="FILE", type=Path, help="timelines; also .svg or .pdf. Needs matplotlib")
    add("--html", metavar="FILE", type=Path, help="timelines to zoom into, a page that loads nothing")


def costs_of(options: argparse.Namespace, num_stages: int, num_ranks: int) -> Costs:
    """The costs given, of so many stages.

    Raises InvalidArgument where a list has another length, or memory is freed that was not taken.
    """
    costs = Costs(input_grad=1.0, weight_grad=1.0) if options.costs is None else Costs.load(options.costs)
    given = {field: value for field in _COSTS if (value := getattr(options, field)) is not None}
    costs = replace(costs, **given)
    counts = {BOUNDARY: num_stages - 1, RANK: num_ranks}
    for field, place in LISTED_BY.items():
        value, expected = getattr(costs, field), counts.get(place, num_stages)
        if isinstance(value, list) and len(value) != expected:
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
