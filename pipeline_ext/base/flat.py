"""``tree_flatten`` and ``tree_unflatten`` of torch's pytrees, fast for what crosses a cut most often."""

import functools
from types import NoneType
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_LEAVES = frozenset((Tensor, str, int, float, bool, NoneType))


def is_flat(value: Any) -> bool:
    """Whether ``value`` is a tuple of leaves alone."""
    return type(value) is tuple and _LEAVES.issuperset(map(type, value))


def flatten(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of ``value``, and its structure."""
    return (list(value), _tuple_of(len(value))) if is_flat(value) else pytree.tree_flatten(value)


def unflatten(leaves: list[Any], spec: pytree.TreeSpec) -> Any:
    """The value that ``flatten`` took apart."""
    return tuple(leaves) if spec is _tuple_of(len(leaves)) else pytree.tree_unflatten(leaves, spec)


@functools.cache
def _tuple_of(leaves: int) -> pytree.TreeSpec:
    return pytree.tree_structure((0,) * leaves)
