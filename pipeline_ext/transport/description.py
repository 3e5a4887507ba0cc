"""What a message holds besides the values of its tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from .. import _C
from .format import Format

Leaves = Sequence[Any]  # of a microbatch's result: tensors, and values that are sent as they are


class Part(NamedTuple):
    """One microbatch's result without its tensors."""

    rest: list[Any]  # its leaves; None in place of a tensor
    numbers: list[tuple[int, int]]  # of each tensor: among the leaves, and among the message's tensors

    def leaves(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The result; ``tensors`` are the message's."""
        leaves = list(self.rest)
        for i, number in self.numbers:
            leaves[i] = tensors[number]
        return leaves


@dataclass(frozen=True)
class Description:
    """Everything about a message but the values of its tensors."""

    format: Format
    requires_grad: list[bool]  # by tensor
    parts: list[Part]  # by microbatch, in the group's order

    def pack(self, results: Sequence[Leaves], buffer: Tensor) -> bool:
        """Packs results that match this description, in one native call.

        Returns False, having written nothing, where they do not match or only the general ``prepare`` can tell.
        """
        return self._template is not None and self._template.pack(results, buffer)

    @cached_property
    def _template(self) -> _C.MessageTemplate | None:
        return self.format.template(self.requires_grad, self.parts)

    def equals(self, other: "Description | None") -> bool:
        """Whether both describe the same: a receiver that knows one needs not be sent the other."""
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
