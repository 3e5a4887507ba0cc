"""Targets cut into microbatches, and the weight of each microbatch's loss."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _split_tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument

_ROWS = TensorChunkSpec(0)


def split_target(target: Any, microbatches: int) -> list[Any]:
    """Cuts each tensor of a pytree along dimension 0.

    Scalars, and leaves that are no tensors, go to every microbatch unchanged. Raises InvalidArgument if a
    tensor has fewer rows than there are microbatches.
    """

    def cut(leaf: Any) -> Sequence[Any]:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return [leaf] * microbatches
        if len(leaf) < microbatches:
            raise InvalidArgument(
                f"target has {len(leaf)} rows for {microbatches} microbatches; give at least one row for each"
            )
        return _split_tensor(leaf, _ROWS, microbatches)

    leaves, spec = pytree.tree_flatten(target)
    columns = [cut(leaf) for leaf in leaves]
    return [pytree.tree_unflatten([column[m] for column in columns], spec) for m in range(microbatches)]


def loss_weights(target_mbs: list[Any] | None, microbatches: int, scale_grads: bool) -> list[float]:
    """By microbatch: its share of the target's rows, or 1 without ``scale_grads``."""
    if not scale_grads:
        return [1] * microbatches
    rows = [n for target in target_mbs or () if (n := _rows(target)) is not None]
    if len(rows) < microbatches or len(set(rows)) == 1:
        return [1 / microbatches] * microbatches
    return [n / sum(rows) for n in rows]


def _rows(target: Any) -> int | None:
    sizes = (len(t) for t in pytree.tree_leaves(target) if isinstance(t, Tensor) and t.dim() > 0)
    return next(sizes, None)
