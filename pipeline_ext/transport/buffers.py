"""Receive buffers that are used again."""

import torch
from torch import Tensor

from ..base.memory import is_shared
from ..packing import aligned


class Buffers:
    """Buffers of equal size for one channel: as many as it needs at once, all allocated with the first."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[Tensor] = []

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A uint8 buffer of at least ``nbytes``, rounded up to a multiple of every element's size."""
        while self._free:
            buffer = self._free.pop()
            if buffer.numel() >= nbytes and buffer.device == device and not is_shared(buffer):
                return buffer
        size = aligned(nbytes)
        buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(self._count)]
        self._free += buffers[1:]
        return buffers[0]

    def give_back(self, buffer: Tensor) -> None:
        """Frees ``buffer`` for reuse. If somebody still holds a view of it, it is left to them."""
        self._free.append(buffer)
