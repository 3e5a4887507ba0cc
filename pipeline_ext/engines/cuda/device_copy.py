"""How results cross a boundary between stages whose tasks run on streams."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import _C
from . import torch_side
from .keepalive import Custody
from .layout import Place, StreamLayout


class Passage:
    """One way across one boundary: keeps what travels in custody, and copies it to another device.

    Attributes:
        stays: whether sender and receiver are on one device.
    """

    def __init__(
        self,
        layout: StreamLayout,
        custody: Custody,
        executor: _C.StreamExecutor,
        devices: Sequence[torch.device],
        boundary: int,
        way: str,
    ) -> None:
        """``devices`` are by stage; ``way`` is "F" for activations and "B" for gradients."""
        self._layout = layout
        self._custody = custody
        self._executor = executor
        sender, receiver = (boundary, boundary + 1) if way == "F" else (boundary + 1, boundary)
        self._from, self._to = devices[sender], devices[receiver]
        self.stays = self._from == self._to
        self._made = ("F" if way == "F" else "BI", sender)
        # What a stage was given is used until its backward has run.
        self._used = ("BW" if layout.plan.has_backward else "F", receiver)
        self._sent = (f"SEND_{way}", sender)

    def handed_over(self, m: int, value: Any) -> None:
        """The receiver uses the sender's own tensors."""
        self._custody.keep(value, self._place(self._made, m), self._place(self._used, m))

    def packed(self, results: dict[int, Any], buffer: Tensor) -> None:
        """Results, by microbatch, have been packed into ``buffer``, just now."""
        packs = max(self._place(self._made, m) for m in results)
        for m, value in results.items():
            self._custody.keep(value, self._place(self._made, m), packs)
        if self.stays:
            self._custody.keep(buffer, packs, self._last_use(results))

    def carry(self, results: Sequence[int], buffer: Tensor, nbytes: int) -> Tensor:
        """As ``transport.channel.Passage``; the current stream is that of the copy."""
        packed = max(self._place(self._made, m) for m in results)
        sent = max(self._layout.place(*self._sent, m) for m in results if self._layout.has(*self._sent, m))
        copied = torch_side.empty(buffer.numel(), self._to)
        self._executor.copy(
            to=copied.data_ptr(),
            to_device=self._to.index,
            source=buffer.data_ptr(),
            source_device=self._from.index,
            nbytes=nbytes,
            stream=torch_side.callers([self._to.index])[0],
        )
        self._custody.keep(buffer, packed, sent)
        self._custody.keep(copied, sent, self._last_use(results))
        return copied

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A buffer for a message, of the current stream."""
        return torch_side.empty(nbytes, device)

    def give_back(self, buffer: Tensor) -> None:
        """It is in custody until its stream may reuse it."""

    def _place(self, of: tuple[str, int], m: int) -> Place:
        kinds, stage = of  # of which the plan has one
        return next(self._layout.place(kind, stage, m) for kind in kinds if self._layout.has(kind, stage, m))

    def _last_use(self, results: Sequence[int] | dict[int, Any]) -> Place:
        # The receiver's tasks of one kind run one after another, so that the last one ends last.
        return max(self._place(self._used, m) for m in results)
