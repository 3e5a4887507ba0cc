"""Joining the outputs of microbatches to the output for the whole batch."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..base.comparable import comparable
from ..base.tensors import detach
from ..errors import InvalidArgument
from .kinds import join_nested
from .opaque import held_tensors, how_to_open


class _CannotJoin(Exception):
    """The microbatches' outputs have no common whole."""


def join(parts: list[Any], batch_dim: int = 0) -> Any:
    """The whole batch's output: tensors are joined along ``batch_dim``, those without dimensions stacked.

    Returns ``parts``, a list with an entry for each microbatch, where they cannot be joined: their structures
    differ, their shapes differ in another dimension (ragged sequences), or a value that is no tensor is not
    the same in all of them.
    """
    if len(parts) == 1:
        return parts[0]
    flats, specs = zip(*(pytree.tree_flatten(part) for part in parts))
    if any(spec != specs[0] for spec in specs):
        return parts
    try:
        return pytree.tree_unflatten([_joined(column, batch_dim) for column in zip(*flats)], specs[0])
    except _CannotJoin:
        return parts


def detached(output: Any) -> Any:
    """An output that is kept: its tensors without their graph.

    Raises InvalidArgument for an object that holds a graph where torch's pytrees do not see it.
    """
    if isinstance(output, Tensor):
        return output.detach()
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, Tensor) and any(tensor.requires_grad for tensor in held_tensors(leaf)):
            raise InvalidArgument(
                f"return_outputs=True would keep a {type(leaf).__name__} in the last stage's output, whose "
                "tensors hold the graph of the forward and are not seen by torch's pytrees; leave it out of "
                f"the output (a cache of transformers: use_cache=False), or {how_to_open(leaf)}"
            )
    return detach(output)


def _joined(column: tuple[Any, ...], batch_dim: int) -> Any:
    first = column[0]
    if all(part is first for part in column):
        return first
    if not all(isinstance(part, Tensor) for part in column):
        keys = [comparable(part) for part in column]
        if keys[0] is None or any(key != keys[0] for key in keys):
            raise _CannotJoin
        return first
    if first.is_nested:
        return join_nested([row for part in column for row in part.unbind()], first.layout)
    if first.dim() == 0:
        return torch.stack(column)
    if first.dim() <= batch_dim:
        raise _CannotJoin
    try:
        return torch.cat(column, batch_dim)
    except RuntimeError:
        raise _CannotJoin from None
