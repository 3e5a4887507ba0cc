"""Which box of a tensor is where: what each process holds of it, who writes what, and what fills a box."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.dtypes import DTYPES, NAMES
from ..base.imported import is_dtensor
from ..errors import InvalidArgument


class Box(NamedTuple):
    """A part of a tensor, from ``offsets`` on."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def is_inside(self, shape: Sequence[int]) -> bool:
        """Whether it is a part of a tensor of this shape."""
        return len(self.offsets) == len(self.shape) == len(shape) and all(
            begin + length <= whole for begin, length, whole in zip(self.offsets, self.shape, shape)
        )

    def common(self, other: "Box") -> "Box | None":
        """What both boxes of one tensor hold; None if that is nothing."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self._ends(), other._ends())
        shape = tuple(end - begin for begin, end in zip(begins, ends))
        return None if any(length <= 0 for length in shape) else Box(begins, shape)

    def slices(self, within: "Box") -> tuple[slice, ...]:
        """The index of this box in a tensor that is the box ``within``."""
        begins = [mine - its for mine, its in zip(self.offsets, within.offsets)]
        return tuple(slice(begin, begin + length) for begin, length in zip(begins, self.shape))

    def _ends(self) -> tuple[int, ...]:
        return tuple(begin + length for begin, length in zip(self.offsets, self.shape))


def whole(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def here(tensor: Tensor) -> tuple[Box, Tensor]:
    """What this process holds of a tensor: its box and its values, which share the memory."""
    if not is_dtensor(tensor):
        return whole(tensor.shape), tensor.detach()
    (chunk,) = tensor.__create_chunk_list__()  # torch's protocol for checkpoints
    return Box(tuple(chunk.offsets), tuple(chunk.sizes)), tensor.to_local().detach()


class Held(NamedTuple):
    """What a process holds of a tensor."""

    dtype: str
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]
    extent: tuple[int, ...]  # of the box

    @property
    def box(self) -> Box:
        return Box(self.offsets, self.extent)

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "Held":
        """Raises InvalidArgument for a tensor that cannot be saved."""
        box, local = here(tensor)
        if local.is_meta:
            raise InvalidArgument(f"{name!r} is on the meta device, without values; initialise or load it")
        if local.dtype not in NAMES or local.layout != torch.strided or hasattr(local, "__tensor_flatten__"):
            raise InvalidArgument(
                f"{name!r} is a {type(local).__name__} of type {local.dtype} and layout {local.layout}, which "
                "a checkpoint cannot hold; save it as a dense tensor of a plain type"
            )
        return cls(NAMES[local.dtype], tuple(tensor.shape), *box)


def writers(held: Sequence[Mapping[str, Held]]) -> dict[str, dict[Box, int]]:
    """The process that writes each box of each tensor; ``held``: by process, the same in all of them.

    A box that several hold is written once, by the one of them that has the fewest bytes to write so far.
    Raises InvalidArgument if processes hold tensors of one name that do not belong together.
    """
    found: dict[str, dict[Box, int]] = {}
    to_write = [0] * len(held)
    for name in dict.fromkeys(name for of_process in held for name in of_process):
        holders = {rank: of_process[name] for rank, of_process in enumerate(held) if name in of_process}
        for box, ranks in _boxes(name, holders).items():
            writer = min(ranks, key=lambda rank: (to_write[rank], rank))
            to_write[writer] += box.size * DTYPES[holders[writer].dtype].itemsize
            found.setdefault(name, {})[box] = writer
    return found


def _boxes(name: str, holders: Mapping[int, Held]) -> dict[Box, list[int]]:
    """The boxes that make a tensor, with the processes that hold each."""
    first, of_first = next(iter(holders.items()))
    boxes: dict[Box, list[int]] = {}
    for rank, of_rank in holders.items():
        if of_rank[:2] != of_first[:2]:
            raise InvalidArgument(
                f"{name!r} is {of_first.dtype}{list(of_first.shape)} in process {first} and "
                f"{of_rank.dtype}{list(of_rank.shape)} in process {rank}; give all of them parts of one model"
            )
        boxes.setdefault(of_rank.box, []).append(rank)
    everything = whole(of_first.shape)
    if everything in boxes:
        return {everything: boxes[everything]}
    boxes = {box: ranks for box, ranks in boxes.items() if box.size}
    held = sum(box.size for box in boxes)
    if held != everything.size:
        raise InvalidArgument(
            f"the processes hold {held} of the {everything.size} elements of {name!r}; save in all processes "
            "that hold parts of it"
        )
    return boxes


def room(dtype: torch.dtype, shape: Sequence[int], like: Any = None) -> Tensor:
    """Zeros to read a tensor into: on the CPU, or sharded as ``like`` if that is a DTensor of this shape."""
    if is_dtensor(like) and tuple(like.shape) == tuple(shape):
        return torch.zeros_like(like, dtype=dtype, requires_grad=False)
    return torch.zeros(tuple(shape), dtype=dtype)
