"""Targets by microbatch, and what each microbatch's loss counts."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.pipelining.microbatch import TensorChunkSpec, _split_tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument

_ROWS = TensorChunkSpec(0)


def split_target(target: Any, microbatches: int) -> list[Any]:
    """A pytree cut leaf by leaf along dimension 0; what has none goes to every microbatch as it is.

    Raises InvalidArgument where a tensor has fewer rows than there are microbatches.
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


def weights(target_mbs: list[Any] | None, microbatches: int, means: bool) -> list[float]:
    """By microbatch: with ``means`` its share of the target's rows, and otherwise 1."""
    if not means:
        return [1] * microbatches
    rows = [n for target in target_mbs or () if (n := _rows(target)) is not None]
    if len(rows) < microbatches or len(set(rows)) == 1:
        return [1 / microbatches] * microbatches
    return [n / sum(rows) for n in rows]


def _rows(target: Any) -> int | None:
    sizes = (len(t) for t in pytree.tree_leaves(target) if isinstance(t, Tensor) and t.dim() > 0)
    return next(sizes, None)
