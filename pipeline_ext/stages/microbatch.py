"""Cutting a batch into microbatches, and joining their results."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument, PipelineError


def batch_size(args: tuple, kwargs: dict) -> int:
    """Length of dimension 0 that all input tensors of one dimension or more share."""
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves((args, kwargs)) if _is_split(leaf)}
    if not sizes:
        raise InvalidArgument(
            "no input tensor has a batch dimension; give at least one tensor of one dimension or more "
            "(torch.as_tensor makes a tensor of another library's array)"
        )
    if len(sizes) > 1:
        rows = [
            (_name(path), leaf.shape[0])
            for path, leaf in pytree.tree_flatten_with_path((args, kwargs))[0]
            if _is_split(leaf)
        ]
        (first, size), (other, differs) = rows[0], next(r for r in rows if r[1] != rows[0][1])
        raise InvalidArgument(
            f"input {first} has {size} rows and input {other} has {differs}; every input tensor is cut "
            "along dimension 0, so all must have the batch there; make a tensor without the batch's rows "
            "a buffer of the model"
        )
    return sizes.pop()


def rows_of(value: Any) -> int | None:
    """Length of dimension 0 of the first tensor that has one; None if there is none."""
    return next((leaf.shape[0] for leaf in pytree.tree_leaves(value) if _is_split(leaf)), None)


def split(value: Any, size: int | None, microbatches: int, what: str) -> list[Any]:
    """``value`` cut leaf by leaf with ``Tensor.tensor_split`` along dimension 0.

    Tensors without dimensions and values that are not tensors go to every microbatch unchanged. The parts
    share the tensor's memory, but each has its own version counter: changing one in place does not invalidate
    what the backward of another saved.
    Raises InvalidArgument if a tensor of ``value`` does not have ``size`` rows, or for another library's
    array.
    """

    def cut(leaf: Any) -> Sequence[Any]:
        if not _is_split(leaf):
            if not isinstance(leaf, Tensor) and hasattr(leaf, "__array__"):
                raise InvalidArgument(
                    f"{what} is a {type(leaf).__module__}.{type(leaf).__name__}; give a tensor "
                    "(torch.as_tensor makes one of it)"
                )
            return [leaf] * microbatches
        if leaf.shape[0] != size:
            raise InvalidArgument(
                f"{what} has {leaf.shape[0]} rows where the batch has {size}; give it one row for "
                "each of the batch's"
            )
        parts = leaf.tensor_split(microbatches)
        return parts if leaf.requires_grad else [part.data for part in parts]

    if isinstance(value, Tensor):
        return list(cut(value))
    flat, spec = pytree.tree_flatten(value)
    columns = [cut(leaf) for leaf in flat]
    return [pytree.tree_unflatten([column[m] for column in columns], spec) for m in range(microbatches)]


def lengths(size: int, microbatches: int) -> list[int]:
    """Rows of each microbatch: the first ``size % microbatches`` have one more than the others."""
    base, extra = divmod(size, microbatches)
    return [base + (m < extra) for m in range(microbatches)]


def merge(parts: list[Any]) -> Any:
    """The whole batch's value from its microbatches': tensors joined along dimension 0.

    Tensors without dimensions are stacked; values that are not tensors are taken from the first microbatch.
    Raises PipelineError if the parts cannot be joined.
    """
    flats, specs = zip(*(pytree.tree_flatten(part) for part in parts))
    if any(spec != specs[0] for spec in specs):
        raise PipelineError(
            "the microbatches' outputs differ in structure and cannot be joined: "
            f"{specs[0]} and {next(s for s in specs if s != specs[0])}"
        )
    joined = []
    for column in zip(*flats):
        if not isinstance(column[0], Tensor):
            joined.append(column[0])
        elif column[0].dim() == 0:
            joined.append(torch.stack(column))
        else:
            try:
                joined.append(torch.cat(column))
            except RuntimeError as error:
                shapes = [list(part.shape) for part in column]
                raise PipelineError(
                    f"the microbatches' outputs cannot be joined along dimension 0: their shapes are {shapes}"
                ) from error
    return pytree.tree_unflatten(joined, specs[0])


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _name(path: tuple) -> str:
    kind, *rest = path
    return f"{'keyword ' if kind.idx else ''}{pytree.keystr(tuple(rest))}"
