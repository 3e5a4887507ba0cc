"""Where each tensor lies in a packed buffer; sender, receiver and both packers use it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.tensors import FLOATING, REPLACEABLE, describe
from ..errors import InvalidArgument
from .arrays import Array, as_tensor, as_tensors

ALIGNMENT = 256  # bytes; every slot begins at a multiple

SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)
UNSIGNED = (torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
PACKABLE = (*FLOATING, *SIGNED, *UNSIGNED)


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to a multiple of ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Slot:
    """Where one tensor lies.

    Attributes:
        offset: of its first byte in the buffer, a multiple of ``ALIGNMENT``.
        nbytes: of the slot, in the wire type; 0 for a tensor without elements.
        shape: of the tensor; the slot holds its elements row-major.
        dtype: of the tensor.
        wire: type of the slot.
    """

    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    wire: torch.dtype

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def describe(self) -> str:
        """Its tensor's type and shape, for error messages."""
        return describe(torch.empty(self.shape, dtype=self.dtype, device="meta"))


@dataclass(frozen=True)
class Layout:
    """The slots of a buffer in order, and the bytes the buffer needs."""

    slots: tuple[Slot, ...]
    nbytes: int

    @classmethod
    def of(cls, tensors: Iterable[Array], wire: torch.dtype | None = None) -> "Layout":
        """The layout for tensors of these shapes and types.

        Args:
            wire: floating-point type to which float64, float32, float16 and bfloat16 tensors are cast; None: no
                casts. float8 tensors, integers and booleans are never cast.

        Raises InvalidArgument for types that cannot be packed.
        """
        if wire is not None and wire not in FLOATING:
            raise InvalidArgument(f"wire is {wire}; give one of {_names(FLOATING)}, or None")
        slots: list[Slot] = []
        end = 0
        for i, tensor in enumerate(as_tensors(tensors)):
            if tensor.dtype not in PACKABLE:
                raise InvalidArgument(f"tensor {i} is {describe(tensor)}; packed are {_names(PACKABLE)}")
            slot_type = wire if wire is not None and tensor.dtype in REPLACEABLE else tensor.dtype
            offset = aligned(end)
            nbytes = tensor.numel() * slot_type.itemsize
            slots.append(Slot(offset, nbytes, tuple(tensor.shape), tensor.dtype, slot_type))
            end = offset + nbytes
        return cls(tuple(slots), end)

    def views(self, buffer: Array) -> list[Tensor]:
        """Each slot of ``buffer`` as a view of its shape and wire type.

        Raises InvalidArgument for a buffer that ``check_buffer`` refuses.
        """
        whole = self.check_buffer(buffer)
        return [
            whole[slot.offset : slot.offset + slot.nbytes].view(slot.wire).view(slot.shape)
            for slot in self.slots
        ]

    def check_buffer(self, given: Array) -> Tensor:
        """The buffer as a tensor.

        Raises InvalidArgument unless it is contiguous, one-dimensional uint8, large enough and aligned.
        """
        buffer = as_tensor(given, "the buffer")
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise InvalidArgument(f"the buffer is {describe(buffer)}; give contiguous uint8[{self.nbytes}]")
        if buffer.numel() < self.nbytes:
            raise InvalidArgument(f"the buffer has {buffer.numel()} bytes; the layout needs {self.nbytes}")
        if buffer.data_ptr() % 16:
            raise InvalidArgument("the buffer's address is not a multiple of 16; give one torch allocated")
        return buffer

    def check_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Raises InvalidArgument unless the tensors have the slots' shapes and types, one for each slot."""
        if len(tensors) != len(self.slots):
            raise InvalidArgument(f"{len(tensors)} tensors; the layout has {len(self.slots)} slots")
        for i, (tensor, slot) in enumerate(zip(tensors, self.slots)):
            if tuple(tensor.shape) != slot.shape or tensor.dtype != slot.dtype:
                raise InvalidArgument(f"tensor {i} is {describe(tensor)}; its slot is for {slot.describe()}")
            if tensor.layout is not torch.strided:
                raise InvalidArgument(f"tensor {i} is not dense; give tensor.to_dense()")
            if tensor.is_neg():
                raise InvalidArgument(f"tensor {i} is a view that negates; give tensor.resolve_neg()")


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
