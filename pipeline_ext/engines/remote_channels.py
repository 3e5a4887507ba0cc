"""What a plan's processes tell one another: results of stages, and decisions."""

from collections.abc import Callable
from typing import Any

import torch

from .. import _C
from ..processes.group import Processes
from ..processes.peer import Peer
from ..transport.decisions import DecisionReceiver, DecisionSender
from ..transport.flow import Flow
from ..transport.make_channels import RemoteChannelOf
from ..transport.remote_receiver import RemoteReceiver
from ..transport.remote_sender import RemoteSender


def remote_channels(
    plan: _C.Plan,
    processes: Processes,
    make_sender: Callable[..., Any] = RemoteSender,
    make_receiver: Callable[..., Any] = RemoteReceiver,
) -> RemoteChannelOf:
    """Makes the function that makes this process's end of a channel between two stages of different ranks.

    That end is a sender, a receiver, or None if neither stage is here.
    """
    tasks: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for task in range(len(plan)):
        kind, stage, m, *_ = plan.describe(task)
        tasks.setdefault((stage, kind), []).append((task, m))
    skips: list[str] = []  # in the order of the calls: each takes tags of its own

    def remote_channel_of(
        sender: int, receiver: int, pack: int, wire: torch.dtype | None, skip: str | None
    ) -> Any:
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
        rank = receives if processes.rank == sends else sends
        number = first if skip is None else plan.num_stages + skips.index(skip)
        peer = Peer(
            processes.messages,
            rank,
            2 * (2 * number + forward),
            processes.describe(rank),
        )
        flow = Flow(
            f"across boundary {first}" if skip is None else f"of skip {skip!r} of stage {first}",
            "activations" if forward else "gradients",
            receiver,
            [sorted(groups[g]) for g in order],
            wire,
            plan.limits[first],
        )
        if processes.rank == sends:
            return make_sender(peer, flow)
        # If the plan lists its sends, receives wait for those and not for the tasks that compute.
        said = {m: task for task, m in tasks.get((sender, "SEND_F" if forward else "SEND_B"), [])}
        return make_receiver(peer, flow, [said.get(groups[g][-1], last[g]) for g in order])

    return remote_channel_of


def decisions_of(plan: _C.Plan, processes: Processes) -> DecisionSender | DecisionReceiver:
    """This process's side where the processes that hold the same stages run the order of the first of them."""
    connections, partners = processes.decisions, processes.partners
    if processes.leads:
        others = range(1, len(partners))
        peers = [Peer(connections, other, 0, f"process {partners[other]}") for other in others]
        return DecisionSender(peers, plan, processes.rank)
    return DecisionReceiver(Peer(connections, 0, 0, f"process {partners[0]}"), plan, processes.rank)
