"""Where a plan's results go to, and come from, other processes."""

from collections.abc import Callable, Sequence

import torch

from .. import _C
from ..transport.remote import Incoming, Line, Outgoing, Way
from .group import Processes

End = Outgoing | Incoming | None


def ends_of(
    plan: _C.Plan,
    processes: Processes,
    wire: Sequence[torch.dtype | None],
    wire_forward: Sequence[torch.dtype | None],
) -> Callable[[int, str], End]:
    """What makes this process's end of a boundary's way ("F" or "B"), if it has one."""
    wire, wire_forward = (given or [None] * plan.num_stages for given in (wire, wire_forward))
    tasks: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for task in range(len(plan)):
        kind, stage, m, *_ = plan.describe(task)
        tasks.setdefault((stage, kind), []).append((task, m))

    def end_of(boundary: int, way: str) -> End:
        forward = way == "F"
        sender, receiver = (boundary, boundary + 1) if forward else (boundary + 1, boundary)
        sends, receives = plan.rank_of_stage[sender], plan.rank_of_stage[receiver]
        if processes.rank not in (sends, receives):
            return None
        computes = [pair for kind in ("F" if forward else "BI") for pair in tasks.get((sender, kind), [])]
        pack = (plan.packs_forward if forward else plan.packs)[boundary]
        groups: dict[int, list[int]] = {}
        last: dict[int, int] = {}
        for task, m in sorted(computes):
            groups.setdefault(m // pack, []).append(m)
            last[m // pack] = task
        order = sorted(groups, key=last.__getitem__)
        said = {m: task for task, m in tasks.get((sender, f"SEND_{way}"), [])}  # where the plan lists its sends
        line = Line(
            processes.messages,
            processes.members[receives if processes.rank == sends else sends],
            2 * (2 * boundary + forward),
            processes.describe(receives if processes.rank == sends else sends),
            torch.device("cpu"),
        )
        course = Way(
            boundary,
            "forward" if forward else "backward",
            [sorted(groups[g]) for g in order],
            (wire_forward if forward else wire)[boundary],
            plan.limits[boundary],
        )
        if processes.rank == sends:
            return Outgoing(line, course)
        return Incoming(line, course, [said.get(groups[g][-1], last[g]) for g in order])

    return end_of
