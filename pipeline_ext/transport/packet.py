"""Buffers for messages between processes: a header, and the packed tensors."""

import ctypes

import torch
from torch import Tensor

from ..base.memory import uses_of
from ..packing import aligned

_HEADER = 256  # bytes; keeps what follows aligned


class Packet:
    """A buffer for one message and its header.

    Attributes:
        body: uint8, where the message's tensors are packed.
    """

    def __init__(self, nbytes: int) -> None:
        """``nbytes``: of the message without its header."""
        self._whole = torch.empty(_HEADER + aligned(nbytes), dtype=torch.uint8)
        self.body = self._whole[_HEADER:]
        self._header = (ctypes.c_int64 * 3).from_address(self._whole.data_ptr())
        self._part = self._whole[:]
        self._uses = uses_of(self._whole)

    @property
    def nbytes(self) -> int:
        """Of the largest message that fits."""
        return self.body.numel()

    def part(self, nbytes: int) -> Tensor:
        """The bytes to send or receive: the header and the first ``nbytes`` of the body."""
        if self._part.numel() != _HEADER + nbytes:
            self._part = self._whole[: _HEADER + nbytes]
        return self._part

    def write_header(self, kind: int, index: int, nbytes: int = 0) -> None:
        self._header[:] = [kind, index, nbytes]

    def read_header(self) -> list[int]:
        return self._header[:]

    def is_viewed(self) -> bool:
        """Whether somebody still holds a view of its memory."""
        return uses_of(self._whole) > self._uses


class Packets:
    """Packets that are used again."""

    def __init__(self) -> None:
        self._free: list[Packet] = []

    def take(self, nbytes: int) -> Packet:
        """A packet for messages of ``nbytes``, of which nobody holds a view."""
        while self._free:
            packet = self._free.pop()
            if packet.nbytes >= nbytes and not packet.is_viewed():
                return packet
        return Packet(nbytes)

    def give_back(self, packet: Packet) -> None:
        """Frees ``packet`` for reuse. If somebody still holds a view of it, it is left to them."""
        self._free.append(packet)
