"""Moves results from one stage to another whose tasks run on streams."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from . import torch_side
from .keepalive import KeepAlive
from .layout import Position, StreamLayout


class DeviceCopy:
    """What one stage sends another: keeps it alive, and copies it to another device.

    Attributes:
        stays: whether sender and receiver are on one device.
    """

    def __init__(
        self,
        layout: StreamLayout,
        keepalive: KeepAlive,
        executor: _C.StreamExecutor,
        devices: Sequence[torch.device],
        sender: int,
        receiver: int,
        is_skip: bool = False,
    ) -> None:
        """``devices`` are by stage."""
        self._keepalive = keepalive
        self._executor = executor
        self._from, self._to = devices[sender], devices[receiver]
        self.stays = self._from == self._to
        direction, kinds = ("F", ["F"]) if sender < receiver else ("B", ["B", "I"])
        self._made = _positions(layout, kinds, sender)
        # A stage uses what it received until its backward has run.
        self._used = _positions(layout, ["B", "W"] if layout.plan.has_backward else ["F"], receiver)
        carrying = (kinds, receiver) if is_skip else ([f"SEND_{direction}"], sender)
        self._copies = _positions(layout, *carrying)

    def handed_over(self, m: int, value: Any) -> None:
        """Keeps ``value`` alive: the receiver uses the sender's own tensors."""
        self._keepalive.keep(value, self._made[m], self._used[m])

    def packed(self, results: dict[int, Any], buffer: Tensor) -> None:
        """Keeps these results, by microbatch, and ``buffer`` alive: they were just packed into it."""
        packs = max(self._made[m] for m in results)
        for m, value in results.items():
            self._keepalive.keep(value, self._made[m], packs)
        if self.stays:
            self._keepalive.keep(buffer, packs, self._last_use(results))

    def copy(self, m: int, results: Sequence[int], buffer: Tensor, nbytes: int) -> Tensor:
        """As ``transport.channel.StreamMemory``; the current stream is that of the copy."""
        packed = max(self._made[m] for m in results)
        copies = self._copies[m]
        copied = torch_side.empty(buffer.numel(), self._to)
        if nbytes:
            self._executor.copy(
                to=copied.data_ptr(),
                to_device=self._to.index,
                source=buffer.data_ptr(),
                source_device=self._from.index,
                nbytes=nbytes,
                stream=torch_side.callers([self._to.index])[0],
            )
        self._keepalive.keep(buffer, packed, copies)
        self._keepalive.keep(copied, copies, self._last_use(results))
        return copied

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A buffer for a message, allocated on the current stream."""
        return torch_side.empty(nbytes, device)

    def give_back(self, buffer: Tensor) -> None:
        """Does nothing: ``buffer`` is kept alive until its stream may reuse it."""

    def _last_use(self, results: Sequence[int] | dict[int, Any]) -> Position:
        # The receiver's tasks of one kind run one after another, so the last one ends last.
        return max(self._used[m] for m in results)


def _positions(layout: StreamLayout, kinds: Sequence[str], stage: int) -> dict[int, Position]:
    """By microbatch, where a stage's action of one of ``kinds`` is enqueued; each has one of them."""
    return {
        m: layout.position(kind, stage, m)
        for kind in kinds
        for m in range(layout.plan.num_microbatches)
        if layout.has(kind, stage, m)
    }
