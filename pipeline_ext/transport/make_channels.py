"""The channels that a plan needs: at its boundaries, and for its skip connections."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .. import _C
from .channel import Channel, StreamMemory
from .direction import AnyChannel, Direction, FromProcess, ToProcess
from .link import LocalLink

WireTypes = Sequence[torch.dtype | None]  # by boundary; empty: the tensors' own
# Takes the sending stage, the receiving stage, and whether it is for a skip.
StreamMemoryOf = Callable[[int, int, bool], StreamMemory]
# Takes the sending stage, the receiving stage, K, the wire type, and the name of a skip or None.
RemoteChannelOf = Callable[[int, int, int, torch.dtype | None, str | None], ToProcess | FromProcess | None]


@dataclass(frozen=True)
class ChannelMaker:
    """Makes channels for one direction at a time; see ``Exchange`` for the attributes."""

    plan: _C.Plan
    wire: WireTypes
    wire_forward: WireTypes
    link: LocalLink
    stream_memory_of: StreamMemoryOf | None
    remote_channel_of: RemoteChannelOf | None

    def at_boundaries(self, forward: bool) -> Direction[int]:
        """The channels between neighbors, by boundary."""
        return Direction({b: self._at_boundary(b, forward) for b in range(self.plan.num_stages - 1)})

    def of_skips(self, names: Sequence[str], forward: bool) -> Direction[str]:
        """The channels of the plan's skip connections, by name."""
        skips = zip(names, self.plan.skips, strict=True)
        return Direction({name: self._of_skip(name, skip, forward) for name, skip in skips})

    def is_between_ranks(self, stage: int, other: int) -> bool:
        return self.plan.rank_of_stage[stage] != self.plan.rank_of_stage[other]

    def _at_boundary(self, boundary: int, forward: bool) -> AnyChannel | None:
        plan = self.plan
        sender, receiver = (boundary, boundary + 1) if forward else (boundary + 1, boundary)
        memory = self._memory(sender, receiver, is_skip=False)
        if not self.is_between_ranks(boundary, boundary + 1):
            return Channel(plan.num_microbatches, stream_memory=memory)
        pack = (plan.packs_forward if forward else plan.packs)[boundary]
        wire = self._wire(boundary, forward)
        if self.remote_channel_of is not None:
            return self.remote_channel_of(sender, receiver, pack, wire, None)
        # Activations are in use while their microbatch is in flight at the later stage, gradients while it is
        # in flight at the earlier one, which holds at least as many.
        in_flight = plan.limits[boundary]
        return Channel(plan.num_microbatches, pack, wire, in_flight, self.link, memory)

    def _of_skip(self, name: str, skip: _C.Skip, forward: bool) -> AnyChannel | None:
        plan = self.plan
        sender, receiver = (skip.source, skip.target) if forward else (skip.target, skip.source)
        memory = self._memory(sender, receiver, is_skip=True)
        if not self.is_between_ranks(skip.source, skip.target):
            return Channel(plan.num_microbatches, stream_memory=memory)
        pack = skip.pack_forward if forward else skip.pack
        wire = self._wire(skip.source if forward else skip.target - 1, forward)
        if self.remote_channel_of is not None:
            return self.remote_channel_of(sender, receiver, pack, wire, name)
        return Channel(plan.num_microbatches, pack, wire, plan.limits[skip.source], self.link, memory)

    def _memory(self, sender: int, receiver: int, is_skip: bool) -> StreamMemory | None:
        return None if self.stream_memory_of is None else self.stream_memory_of(sender, receiver, is_skip)

    def _wire(self, boundary: int, forward: bool) -> torch.dtype | None:
        wires = self.wire_forward if forward else self.wire
        return wires[boundary] if wires else None
