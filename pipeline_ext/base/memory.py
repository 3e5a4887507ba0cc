"""Finds the memory of tensors: tensors that share memory at the sender share it at the receiver too."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn

from ..errors import PipelineError
from .imported import is_dtensor

# Regions begin at multiples of it, because the last bit of sums and products may depend on alignment.
REGION_ALIGNMENT = 64

# A tensor with gaps in memory is sent with its gaps up to this many times its own size, then without.
_WIDEST = 4


class Look(NamedTuple):
    """All of a tensor but its values."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    conjugate: bool  # whether reads conjugate it
    negative: bool  # whether reads negate it
    region: int  # index of its region
    offset: int  # bytes from the begin of its region

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie in order in memory, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride)):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    def see(self, storage: UntypedStorage, begin: int) -> Tensor:
        """Such a tensor in ``storage``, its region from byte ``begin``; it has its own version counter."""
        offset = (begin + self.offset) // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor = empty.set_(storage, offset, self.shape, self.stride)
        if self.conjugate:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if self.negative else tensor


class Region(NamedTuple):
    """A range of bytes in a storage."""

    storage: UntypedStorage
    begin: int
    end: int

    def bytes(self) -> Tensor:
        """A view, uint8[end - begin]."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return empty.set_(self.storage, self.begin, (self.end - self.begin,), (1,))


def find_regions(tensors: Sequence[Tensor]) -> tuple[list[Look], list[Region]]:
    """A look of each tensor, and the regions that hold them: tensors that overlap are in one region.

    Raises PipelineError for tensors that are not plain and dense.
    """
    for tensor in tensors:
        _check_plain(tensor)
    tensors = list(tensors)
    extents = [_extent(tensor) for tensor in tensors]
    looks: dict[int, Look] = {}
    regions: list[Region] = []
    for group in _overlapping(extents):
        (i, *others) = group
        storage, begin, end = extents[i]
        if not others and end - begin > _WIDEST * tensors[i].nbytes > 0:
            tensors[i] = tensors[i].contiguous()
            storage, begin, end = _extent(tensors[i])
        begin = begin // REGION_ALIGNMENT * REGION_ALIGNMENT
        regions.append(Region(storage, begin, max([end, *(extents[j].end for j in others)])))
        for j in group:
            tensor = tensors[j]
            looks[j] = Look(
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
                tensor.is_conj(),
                tensor.is_neg(),
                len(regions) - 1,
                _begin(tensor) - begin,
            )
    return [looks[i] for i in range(len(tensors))], regions


def is_shared(tensor: Tensor) -> bool:
    """Whether another tensor uses its memory: a view, or a tensor that autograd made from it."""
    return uses_of(tensor) > 2  # the tensor, and the storage's own object


def uses_of(tensor: Tensor) -> int:
    """How many objects hold its storage."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether an element of one dense tensor is an element of another."""
    return any(
        _share_elements(tensors[i], tensors[j])
        for group in _overlapping([_extent(tensor) for tensor in tensors])
        for n, j in enumerate(group)
        for i in group[:n]
    )


def _check_plain(tensor: Tensor) -> None:
    if is_dtensor(tensor):
        raise PipelineError(
            "a DTensor cannot be packed, nor be a skip connection; hand over its to_local() or full_tensor(), "
            "and make it again with DTensor.from_local"
        )
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested
    if not plain or tensor.layout is not torch.strided:
        kind = "nested tensor" if tensor.is_nested else f"{type(tensor).__name__} of {tensor.layout}"
        raise PipelineError(
            f"a {kind} cannot be packed into a message, only plain dense tensors can; give pack=1 and no "
            "wire type"
        )


def _begin(tensor: Tensor) -> int:
    """The byte of its storage where its first element is."""
    return int(tensor.storage_offset()) * tensor.itemsize


def _extent(tensor: Tensor) -> Region:
    """The bytes from its first element to its last."""
    begin = _begin(tensor)
    if tensor.numel() == 0:
        return Region(tensor.untyped_storage(), begin, begin)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return Region(tensor.untyped_storage(), begin, begin + elements * tensor.itemsize)


def _overlapping(extents: Sequence[Region]) -> list[list[int]]:
    """Indices of extents in groups that overlap; a group is sorted by begin, groups by their least index."""
    groups: list[list[int]] = []
    last: tuple[int, int] | None = None  # address of the last group's storage, and the end of the group
    for i in sorted(range(len(extents)), key=lambda i: (extents[i].storage.data_ptr(), extents[i].begin)):
        storage, begin, end = extents[i]
        memory = storage.data_ptr()
        if begin < end and last is not None and memory == last[0] and begin < last[1]:
            groups[-1].append(i)
            last = (memory, max(end, last[1]))
        else:
            groups.append([i])
            last = (memory, end)
    return sorted(groups, key=min)


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """The same for two tensors of one storage: marks the bytes of ``a``, looks at those of ``b`` for marks."""
    storage = a.untyped_storage()
    marks = torch.zeros(storage.nbytes(), dtype=torch.bool)

    def of(tensor: Tensor) -> Tensor:
        size = tensor.itemsize
        strides = [*(stride * size for stride in tensor.stride()), 1]
        return marks.as_strided([*tensor.shape, size], strides, tensor.storage_offset() * size)

    of(a).fill_(True)
    return bool(of(b).any())
