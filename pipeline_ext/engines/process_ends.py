"""Where a plan's results go to, and come from, other processes."""

from collections.abc import Callable
from typing import Any

import torch

from .. import _C
from ..processes.group import Processes
from ..transport.exchange import EndOf
from ..transport.remote import Incoming, Line, Outgoing, Way


def ends_of(
    plan: _C.Plan,
    processes: Processes,
    outgoing: Callable[..., Any] = Outgoing,
    incoming: Callable[..., Any] = Incoming,
) -> EndOf:
    """What makes this process's end of a way between two stages of different ranks, if it has one.

    It takes the stage that sends, the one that receives, K, the wire type, and the name of a skip or None.
    ``outgoing`` and ``incoming`` make the ends.
    """
    tasks: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for task in range(len(plan)):
        kind, stage, m, *_ = plan.describe(task)
        tasks.setdefault((stage, kind), []).append((task, m))
    skips: list[str] = []  # those met so far: each takes numbers of its own

    def end_of(sender: int, receiver: int, pack: int, wire: torch.dtype | None, skip: str | None) -> Any:
        forward = sender < receiver
        first = min(sender, receiver)
        if skip is not None and skip not in skips:
            skips.append(skip)
        sends, receives = plan.rank_of_stage[sender], plan.rank_of_stage[receiver]
        if processes.rank not in (sends, receives):
            return None
        computes = [pair for kind in ("F" if forward else "BI") for pair in tasks.get((sender, kind), [])]
        groups: dict[int, list[int]] = {}
        last: dict[int, int] = {}
        for task, m in sorted(computes):
            groups.setdefault(m // pack, []).append(m)
            last[m // pack] = task
        order = sorted(groups, key=last.__getitem__)
        peer = receives if processes.rank == sends else sends
        number = first if skip is None else plan.num_stages + skips.index(skip)
        line = Line(
            processes.messages,
            peer,
            2 * (2 * number + forward),
            processes.describe(peer),
        )
        way = Way(
            f"across boundary {first}" if skip is None else f"of skip {skip!r} of stage {first}",
            "activations" if forward else "gradients",
            receiver,
            [sorted(groups[g]) for g in order],
            wire,
            plan.limits[first],
        )
        if processes.rank == sends:
            return outgoing(line, way)
        # Where the plan lists its sends they, and not what computes, are waited for.
        said = {m: task for task, m in tasks.get((sender, "SEND_F" if forward else "SEND_B"), [])}
        return incoming(line, way, [said.get(groups[g][-1], last[g]) for g in order])

    return end_of
