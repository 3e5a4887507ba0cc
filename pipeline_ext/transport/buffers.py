"""Memory for messages, used again and again."""

import torch
from torch import Tensor

from ..base.memory import is_shared
from ..packing import aligned


class Buffers:
    """Equal buffers of one channel: as many as it needs at once, all made when the first is."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[Tensor] = []

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A uint8 buffer of at least ``nbytes``, a multiple of every element's size."""
        while self._free:
            buffer = self._free.pop()
            if buffer.numel() >= nbytes and buffer.device == device and not is_shared(buffer):
                return buffer
        size = aligned(nbytes)
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(self._count)]
        self._free += buffers[1:]
        return buffers[0]

    def give_back(self, buffer: Tensor) -> None:
        """The channel needs it no more; whoever still looks at a part of it keeps that."""
        self._free.append(buffer)
