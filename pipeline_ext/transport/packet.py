"""The memory of messages between processes: a header, and what is packed."""

import ctypes

import torch
from torch import Tensor

from ..base.memory import uses_of
from ..packing import aligned

_HEADER = 256  # bytes; what follows is aligned


class Packet:
    """Room for one message, and the header it begins with.

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
        """Of the largest message that it has room for."""
        return self.body.numel()

    def part(self, nbytes: int) -> Tensor:
        """What travels of it: the header and the first ``nbytes`` of the body."""
        if self._part.numel() != _HEADER + nbytes:
            self._part = self._whole[: _HEADER + nbytes]
        return self._part

    def write_header(self, kind: int, index: int, nbytes: int = 0) -> None:
        self._header[:] = kind, index, nbytes

    def read_header(self) -> list[int]:
        return self._header[:]

    def is_read(self) -> bool:
        """Whether a tensor of another holder still looks into its memory."""
        return uses_of(self._whole) > self._uses


class Packets:
    """Packets that are used again and again."""

    def __init__(self) -> None:
        self._free: list[Packet] = []

    def take(self, nbytes: int) -> Packet:
        """One for messages of so many bytes, which nobody looks into."""
        while self._free:
            packet = self._free.pop()
            if packet.nbytes >= nbytes and not packet.is_read():
                return packet
        return Packet(nbytes)

    def give_back(self, packet: Packet) -> None:
        """It is needed no more; whoever still looks at a part of it keeps that."""
        self._free.append(packet)
