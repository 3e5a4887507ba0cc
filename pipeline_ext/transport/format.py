"""How the tensors of a message lie in its buffer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..base.memory import REGION_ALIGNMENT, Look, Region
from ..packing import Layout, Packer, packer
from ..packing.layout import PACKABLE


class Format(ABC):
    """How tensors of given looks lie in a message.

    Attributes:
        looks: of the tensors.
        sent_nbytes: bytes that are sent.
        nbytes: bytes of the buffer: those, and what the receiver needs after them.
    """

    sent_nbytes: int
    nbytes: int

    def __init__(self, looks: list[Look]) -> None:
        self.looks = looks

    @abstractmethod
    def pack(self, tensors: Sequence[Tensor], regions: Sequence[Region], buffer: Tensor) -> None:
        """Writes the message. ``regions``: the memory of the tensors."""

    @abstractmethod
    def open(self, buffer: Tensor) -> list[Tensor]:
        """The tensors of a message, as views of its buffer; to be called once.

        Each has its own version counter: changing one in place does not invalidate the others for autograd.
        """

    def template(self, requires_grad: Sequence[bool], parts: Sequence[Any]) -> _C.MessageTemplate | None:
        """Packs a message of this format in one native call; None if this format needs the general path."""
        return None


class AsIs(Format):
    """Sends the memory of the tensors unchanged: strides, overlaps and alignment are kept."""

    def __init__(self, looks: list[Look], region_sizes: Sequence[int]) -> None:
        """``region_sizes``: bytes of each region."""
        super().__init__(looks)
        self.region_sizes = list(region_sizes)
        self._layout = Layout.of(
            torch.empty(size, dtype=torch.uint8, device="meta") for size in self.region_sizes
        )
        self._packer: Packer | None = None
        self.sent_nbytes = self.nbytes = self._layout.nbytes

    def pack(self, tensors: Sequence[Tensor], regions: Sequence[Region], buffer: Tensor) -> None:
        memory = [region.bytes() for region in regions]
        if self._packer is None:
            self._packer = packer(self._layout, memory)
        else:
            self._packer.rebind(memory)
        self._packer.pack(buffer)
        self._packer.release()

    def copy(self, regions: Sequence[Region], buffer: Tensor) -> None:
        """Writes the message by plain copies, which a CUDA graph can capture: ``pack`` uploads a table."""
        slots = [buffer[slot.offset : slot.offset + slot.nbytes] for slot in self._layout.slots]
        if slots:
            torch._foreach_copy_(slots, [region.bytes() for region in regions])

    def open(self, buffer: Tensor) -> list[Tensor]:
        storage, begin = buffer.untyped_storage(), int(buffer.storage_offset())
        slots = self._layout.slots
        return [look.see(storage, begin + slots[look.region].offset) for look in self.looks]

    def template(self, requires_grad: Sequence[bool], parts: Sequence[Any]) -> _C.MessageTemplate | None:
        if len(self.region_sizes) < len(self.looks) or not all(map(_is_copied_whole, self.looks)):
            return None
        tensors = [
            (look.dtype, look.shape, self._layout.slots[look.region].offset + look.offset, look.offset)
            for look in self.looks
        ]
        return _C.MessageTemplate(tensors, requires_grad, parts, REGION_ALIGNMENT)


def _is_copied_whole(look: Look) -> bool:
    return look.dtype in PACKABLE and look.is_contiguous and not look.negative
