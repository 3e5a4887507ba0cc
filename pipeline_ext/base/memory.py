"""The memory that tensors lie in, so that what shares memory at the sender's shares it at the receiver's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage, nn

from ..errors import PipelineError
from .imported import is_dtensor

# Regions begin at multiples of it: on alignment too sums and products may depend, to the last bit.
REGION_ALIGNMENT = 64

# A tensor with gaps in memory travels with them, up to this many times its own size; then without.
_WIDEST = 4


class Look(NamedTuple):
    """All there is to know of a tensor but its values."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    conjugate: bool  # to be conjugated, or negated, whenever it is read
    negative: bool
    region: int
    offset: int  # bytes, from where its region begins

    @property
    def is_contiguous(self) -> bool:
        """Whether it takes its memory in the order of its elements, without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride)):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    def see(self, storage: UntypedStorage, begin: int) -> Tensor:
        """Such a tensor in other memory, where its region begins at byte ``begin``; its version is its own."""
        offset = (begin + self.offset) // self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor = empty.set_(storage, offset, self.shape, self.stride)
        if self.conjugate:
            tensor = tensor.conj()
        return torch._neg_view(tensor) if self.negative else tensor


class Region(NamedTuple):
    """Bytes of a storage."""

    storage: UntypedStorage
    begin: int
    end: int

    def bytes(self) -> Tensor:
        """They as a tensor, uint8[end - begin]; nothing is copied."""
        empty = torch.empty(0, dtype=torch.uint8, device=self.storage.device)
        return empty.set_(self.storage, self.begin, (self.end - self.begin,), (1,))


def find_regions(tensors: Sequence[Tensor]) -> tuple[list[Look], list[Region]]:
    """How tensors look, and the regions they lie in: one for those whose memory overlaps.

    Raises PipelineError for tensors that are not plain and dense.
    """
    for tensor in tensors:
        _check_plain(tensor)
    tensors = list(tensors)
    places = [_place(tensor) for tensor in tensors]
    looks: list[Look | None] = [None] * len(tensors)
    regions = []
    for group in _overlapping(places):
        (i, *others) = group
        storage, begin, end = places[i]
        if not others and end - begin > _WIDEST * tensors[i].nbytes > 0:
            tensors[i] = tensors[i].contiguous()
            storage, begin, end = _place(tensors[i])
        begin = begin // REGION_ALIGNMENT * REGION_ALIGNMENT
        regions.append(Region(storage, begin, max([end, *(places[j].end for j in others)])))
        for j in group:
            tensor = tensors[j]
            looks[j] = Look(
                tensor.dtype,
                tensor.shape,
                tensor.stride(),
                tensor.is_conj(),
                tensor.is_neg(),
                len(regions) - 1,
                tensor.storage_offset() * tensor.itemsize - begin,
            )
    return looks, regions


def is_shared(tensor: Tensor) -> bool:
    """Whether another tensor looks into its memory: one that views it, or that autograd made from it."""
    return uses_of(tensor) > 2  # the tensor, and the storage's own object


def uses_of(tensor: Tensor) -> int:
    """How many objects hold its memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def share_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether an element of one dense tensor is an element of another."""
    return any(
        _share_elements(tensors[i], tensors[j])
        for group in _overlapping([_place(tensor) for tensor in tensors])
        for n, j in enumerate(group)
        for i in group[:n]
    )


def _check_plain(tensor: Tensor) -> None:
    if is_dtensor(tensor):
        raise PipelineError(
            "a DTensor is not packed with others, and no skip connection; hand over its to_local() or "
            "full_tensor(), and make it anew with DTensor.from_local"
        )
    plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested
    if not plain or tensor.layout is not torch.strided:
        kind = "nested tensor" if tensor.is_nested else f"{type(tensor).__name__} of {tensor.layout}"
        raise PipelineError(
            f"a {kind} cannot be packed into a message, only plain dense tensors can; give pack=1 and no "
            "wire type"
        )


def _place(tensor: Tensor) -> Region:
    """From its first element to its last."""
    begin = tensor.storage_offset() * tensor.itemsize
    if tensor.numel() == 0:
        return Region(tensor.untyped_storage(), begin, begin)
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return Region(tensor.untyped_storage(), begin, begin + elements * tensor.itemsize)


def _overlapping(places: Sequence[Region]) -> list[list[int]]:
    """The places in groups that overlap, each ordered by where they begin, the groups by their first place."""
    groups: list[list[int]] = []
    last: tuple[int, int] | None = None  # memory of the last group's storage, and the group's end
    for i in sorted(range(len(places)), key=lambda i: (places[i].storage.data_ptr(), places[i].begin)):
        storage, begin, end = places[i]
        memory = storage.data_ptr()
        if begin < end and last is not None and memory == last[0] and begin < last[1]:
            groups[-1].append(i)
            last = (memory, max(end, last[1]))
        else:
            groups.append([i])
            last = (memory, end)
    return sorted(groups, key=min)


def _share_elements(a: Tensor, b: Tensor) -> bool:
    """Of two tensors of one storage; marks each byte of the one and looks there for the other."""
    storage = a.untyped_storage()
    marks = torch.zeros(storage.nbytes(), dtype=torch.bool)

    def of(tensor: Tensor) -> Tensor:
        size = tensor.itemsize
        strides = [*(stride * size for stride in tensor.stride()), 1]
        return marks.as_strided([*tensor.shape, size], strides, tensor.storage_offset() * size)

    of(a).fill_(True)
    return bool(of(b).any())
