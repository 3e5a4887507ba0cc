"""The two tables on the device that tell the kernels where everything lies.

Chunks: a row (slot, number of the chunk in the slot) for each program, int32. Slots: a row for each slot with
the columns below, then (size, stride) of each dimension to iterate over, innermost first, all int64.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.tensors import FLOATING
from .layout import Layout

BLOCK = 4096  # elements; with 8 warps each thread stores 16 bytes even if an element takes one byte
_WORD = 4  # bytes

# Columns of the table of slots
ADDRESS = 0  # of the tensor
OFFSET = 1  # of the slot in the buffer, bytes
COUNT = 2  # elements
KIND = 3  # index in kinds(layout)
WIDE = 4  # elements, in whole blocks, that 128-bit accesses can move
RANK = 5  # dimensions to iterate over, at least 1
DIMENSIONS = 6  # size and stride of the innermost one, and so on


def kinds(layout: Layout) -> list[tuple[torch.dtype, torch.dtype]]:
    """The distinct pairs (type of a tensor, type of its slot)."""
    return sorted({(slot.dtype, slot.wire) for slot in layout.slots}, key=str)


def blocks(dtype: torch.dtype) -> int:
    """How many blocks a program copies of tensors of this type.

    One of floating-point types, which it may have to convert. Of bytes and the like as many as make a block of
    words: enough accesses are then under way to hide the memory's latency.
    """
    return 1 if dtype in FLOATING else max(1, _WORD // dtype.itemsize)


def chunk_table(layout: Layout) -> Tensor:
    """A row for each program; int32 [programs, 2], on the CPU."""
    sizes = [BLOCK * blocks(slot.dtype) for slot in layout.slots]
    counts = torch.tensor([-(-s.count // size) for s, size in zip(layout.slots, sizes)], dtype=torch.int64)
    slots = torch.arange(len(counts)).repeat_interleave(counts)
    chunks = torch.arange(len(slots)) - (counts.cumsum(0) - counts)[slots]
    return torch.stack([slots, chunks], dim=1).int()


def room(layout: Layout) -> int:
    """Most dimensions to iterate over in tensors of a layout, whatever their strides; at least 1."""
    return max((sum(size != 1 for size in slot.shape) for slot in layout.slots), default=0) or 1


def slot_table(layout: Layout, tensors: Sequence[Tensor]) -> Tensor:
    """A row for each slot; int64, on the CPU."""
    length = room(layout)
    kind = {pair: i for i, pair in enumerate(kinds(layout))}
    rows = []
    for slot, tensor in zip(layout.slots, tensors):
        address, dimensions = tensor.data_ptr(), collapse(tensor) or [(1, 1)]
        row_major = dimensions == [(slot.count, 1)]
        wide = slot.count // BLOCK * BLOCK if row_major and address % 16 == 0 else 0
        padding = [(1, 0)] * (length - len(dimensions))
        columns = (address, slot.offset, slot.count, kind[slot.dtype, slot.wire], wide, len(dimensions))
        rows.append([*columns, *sum(dimensions + padding, ())])
    return torch.tensor(rows, dtype=torch.int64)


def collapse(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the fewest dimensions that visit the elements in row-major order, innermost first."""
    dimensions: list[tuple[int, int]] = []
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
        if size == 1:
            continue
        if dimensions and stride == dimensions[-1][0] * dimensions[-1][1]:
            size, stride = size * dimensions[-1][0], dimensions[-1][1]
            dimensions.pop()
        dimensions.append((size, stride))
    return dimensions
