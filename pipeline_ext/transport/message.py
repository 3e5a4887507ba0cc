"""A message of several microbatches' results, as its sender prepares it and as its receiver reads it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..base.memory import Region, find_regions
from .cast import Cast, is_cast
from .description import Description, Leaves, Part
from .format import AsIs, Format


def nbytes_of(result: Any) -> int:
    """Bytes of the tensors in a microbatch's result, any pytree."""
    tensors = (leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


class Prepared(NamedTuple):
    """A message that is ready to be packed."""

    description: Description
    tensors: list[Tensor]
    regions: list[Region]

    def pack(self, buffer: Tensor) -> None:
        """Writes the message."""
        self.description.format.pack(self.tensors, self.regions, buffer)


def prepare(results: Sequence[Leaves], wire: torch.dtype | None, known: Format | None) -> Prepared:
    """A message with these results; its format is ``known`` itself if that fits.

    Raises PipelineError for tensors that cannot be packed.
    """
    distinct = {id(leaf): leaf for leaves in results for leaf in leaves if isinstance(leaf, Tensor)}
    number_of = {key: number for number, key in enumerate(distinct)}
    tensors = list(distinct.values())
    format, regions = choose_format(tensors, wire, known)
    parts = [
        Part(
            [None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            [(i, number_of[id(leaf)]) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)],
        )
        for leaves in results
    ]
    description = Description(format, [tensor.requires_grad for tensor in tensors], parts)
    return Prepared(description, tensors, regions)


def choose_format(
    tensors: Sequence[Tensor], wire: torch.dtype | None, known: Format | None
) -> tuple[Format, list[Region]]:
    """The format of a message with these tensors, ``known`` if that fits, and the memory they lie in.

    Raises PipelineError for tensors that cannot be packed.
    """
    looks, regions = find_regions(tensors)
    if known is not None and known.looks == looks:
        return known, regions
    if wire is not None and any(is_cast(tensor.dtype, wire) for tensor in tensors):
        return Cast(tensors, looks, wire), regions
    return AsIs(looks, [region.end - region.begin for region in regions]), regions


class Message:
    """A received message: the results of a group of microbatches in one buffer.

    Attributes:
        is_copied: whether ``buffer`` is a copy on the receiver's device.
    """

    def __init__(self, description: Description, buffer: Tensor) -> None:
        self.description = description
        self.buffer = buffer
        self.is_copied = False
        self._in_use = len(description.parts)  # results
        self._tensors: list[Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        """All tensors of the message, views of its buffer."""
        if self._tensors is None:
            self._tensors = self.description.format.open(self.buffer)
            for tensor, needed in zip(self._tensors, self.description.requires_grad):
                tensor.requires_grad_(needed)
        return self._tensors

    def release(self) -> bool:
        """Marks one result consumed; True once the buffer is free."""
        self._in_use -= 1
        if self._in_use > 0:
            return False
        self._tensors = None  # the buffer's next user checks that no view of it is left
        return True


class Result(NamedTuple):
    """One microbatch's part of a received message."""

    message: Message
    part: Part

    def leaves(self) -> list[Any]:
        return self.part.leaves(self.message.tensors())
