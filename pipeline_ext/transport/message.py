"""What a message of several microbatches' results holds, and the results as its receiver sees them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _C
from ..base.memory import Region
from .format import Format, message_of

Leaves = Sequence[Any]  # tensors, and what goes along as it is


def nbytes_of(result: Any) -> int:
    """Bytes of the tensors in a microbatch's result, any pytree."""
    tensors = (leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


class Part(NamedTuple):
    """One microbatch's result without its tensors."""

    rest: list[Any]  # its leaves; None in place of a tensor
    numbers: list[tuple[int, int]]  # of each tensor among the leaves and in the message

    def leaves(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The result; ``tensors`` are the message's."""
        leaves = list(self.rest)
        for i, number in self.numbers:
            leaves[i] = tensors[number]
        return leaves


@dataclass(frozen=True)
class Contents:
    """All there is to know of a message but the values of its tensors."""

    format: Format
    requires_grad: list[bool]  # by tensor
    parts: list[Part]  # by microbatch, in the group's order

    def pack(self, results: Sequence[Leaves], buffer: Tensor) -> bool:
        """Packs results that look as these; False where they do not, or only ``fill`` can tell."""
        return self._template is not None and self._template.pack(results, buffer)

    @cached_property
    def _template(self) -> _C.MessageTemplate | None:
        return self.format.template(self.requires_grad, self.parts)

    def equals(self, other: "Contents | None") -> bool:
        """Whether whoever knows one knows the other."""
        return (
            other is not None
            and self.format is other.format
            and self.requires_grad == other.requires_grad
            and len(self.parts) == len(other.parts)
            and all(map(_equal_parts, self.parts, other.parts))
        )


def _equal_parts(a: Part, b: Part) -> bool:
    return (
        a.numbers == b.numbers
        and len(a.rest) == len(b.rest)
        and all(type(x) is type(y) and x == y for x, y in zip(a.rest, b.rest))
    )


class Filling(NamedTuple):
    """What is to be packed into a message."""

    contents: Contents
    tensors: list[Tensor]
    regions: list[Region]

    def pack(self, buffer: Tensor) -> None:
        """Writes the message."""
        self.contents.format.pack(self.tensors, self.regions, buffer)


def fill(results: Sequence[Leaves], wire: torch.dtype | None, known: Format | None) -> Filling:
    """A message with these results; its format is ``known`` itself, where that fits.

    Raises PipelineError for tensors that cannot be packed.
    """
    apart = {id(leaf): leaf for leaves in results for leaf in leaves if isinstance(leaf, Tensor)}
    number_of = {key: number for number, key in enumerate(apart)}
    tensors = list(apart.values())
    format, regions = message_of(tensors, wire, known)
    parts = [
        Part(
            [None if isinstance(leaf, Tensor) else leaf for leaf in leaves],
            [(i, number_of[id(leaf)]) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)],
        )
        for leaves in results
    ]
    contents = Contents(format, [tensor.requires_grad for tensor in tensors], parts)
    return Filling(contents, tensors, regions)


class Message:
    """The results of a group of microbatches in one buffer, at the receiver's."""

    def __init__(self, contents: Contents, buffer: Tensor) -> None:
        self.contents = contents
        self.buffer = buffer
        self._unread = len(contents.parts)  # results that are still needed
        self._tensors: list[Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        if self._tensors is None:
            self._tensors = self.contents.format.open(self.buffer)
            for tensor, needed in zip(self._tensors, self.contents.requires_grad):
                tensor.requires_grad_(needed)
        return self._tensors

    def read(self) -> bool:
        """One more result is needed no more; returns whether that was the last: the buffer is free."""
        self._unread -= 1
        if self._unread > 0:
            return False
        self._tensors = None  # first the views: who takes the buffer next looks whether there are any
        return True


class Result(NamedTuple):
    """One microbatch's part of a message."""

    message: Message
    part: Part

    def leaves(self) -> list[Any]:
        return self.part.leaves(self.message.tensors())
