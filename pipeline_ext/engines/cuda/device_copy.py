"""Moves results across a boundary between stages whose tasks run on streams."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from . import torch_side
from .keepalive import KeepAlive
from .layout import Position, StreamLayout


class DeviceCopy:
    """One direction across one boundary: keeps what is sent alive, and copies it to another device.

    Attributes:
        stays: whether sender and receiver are on one device.
    """

    def __init__(
        self,
        layout: StreamLayout,
        keepalive: KeepAlive,
        executor: _C.StreamExecutor,
        devices: Sequence[torch.device],
        boundary: int,
        direction: str,
    ) -> None:
        """``devices`` are by stage; ``direction`` is "F" for activations and "B" for gradients."""
        self._layout = layout
        self._keepalive = keepalive
        self._executor = executor
        sender, receiver = (boundary, boundary + 1) if direction == "F" else (boundary + 1, boundary)
        self._from, self._to = devices[sender], devices[receiver]
        self.stays = self._from == self._to
        self._made = ("F" if direction == "F" else "BI", sender)
        # A stage uses what it received until its backward has run.
        self._used = ("BW" if layout.plan.has_backward else "F", receiver)
        self._sent = (f"SEND_{direction}", sender)

    def handed_over(self, m: int, value: Any) -> None:
        """Keeps ``value`` alive: the receiver uses the sender's own tensors."""
        self._keepalive.keep(value, self._position(self._made, m), self._position(self._used, m))

    def packed(self, results: dict[int, Any], buffer: Tensor) -> None:
        """Keeps these results, by microbatch, and ``buffer`` alive: they were just packed into it."""
        packs = max(self._position(self._made, m) for m in results)
        for m, value in results.items():
            self._keepalive.keep(value, self._position(self._made, m), packs)
        if self.stays:
            self._keepalive.keep(buffer, packs, self._last_use(results))

    def copy(self, results: Sequence[int], buffer: Tensor, nbytes: int) -> Tensor:
        """As ``transport.channel.StreamMemory``; the current stream is that of the copy."""
        packed = max(self._position(self._made, m) for m in results)
        sent = max(self._layout.position(*self._sent, m) for m in results if self._layout.has(*self._sent, m))
        copied = torch_side.empty(buffer.numel(), self._to)
        self._executor.copy(
            to=copied.data_ptr(),
            to_device=self._to.index,
            source=buffer.data_ptr(),
            source_device=self._from.index,
            nbytes=nbytes,
            stream=torch_side.callers([self._to.index])[0],
        )
        self._keepalive.keep(buffer, packed, sent)
        self._keepalive.keep(copied, sent, self._last_use(results))
        return copied

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A buffer for a message, allocated on the current stream."""
        return torch_side.empty(nbytes, device)

    def give_back(self, buffer: Tensor) -> None:
        """Does nothing: ``buffer`` is kept alive until its stream may reuse it."""

    def _position(self, of: tuple[str, int], m: int) -> Position:
        kinds, stage = of  # the plan has one of these kinds
        return next(self._layout.position(k, stage, m) for k in kinds if self._layout.has(k, stage, m))

    def _last_use(self, results: Sequence[int] | dict[int, Any]) -> Position:
        # The receiver's tasks of one kind run one after another, so the last one ends last.
        return max(self._position(self._used, m) for m in results)
