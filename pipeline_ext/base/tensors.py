"""Finds tensors in any value and the dense ones that hold a tensor, and describes values in error messages."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .flat import is_flat

# Types that a wire type may replace, and all floating-point types that messages may carry.
REPLACEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOATING = (*REPLACEABLE, torch.float8_e4m3fn, torch.float8_e5m2)


def differentiable(value: Any) -> list[Tensor]:
    """The tensors of ``value`` that require a gradient, in pytree order, each once."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    leaves = value if is_flat(value) else pytree.tree_leaves(value)
    tensors = (v for v in leaves if isinstance(v, Tensor) and v.requires_grad)
    return list({id(tensor): tensor for tensor in tensors}.values())


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, type and layout, and equal values; nan equals nan."""
    if a.shape != b.shape or a.dtype != b.dtype or a.layout != b.layout:
        return False
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def dense_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The dense tensors that hold a tensor's values: those of a DTensor, or of a sparse or jagged one."""
    if is_traceable_wrapper_subclass(tensor):
        held = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        for part in held:
            if isinstance(part, Tensor):  # newer torch lists a DTensor's mesh too
                yield from dense_parts(part)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor


def detach(value: Any) -> Any:
    """``value`` with its tensors detached."""
    return pytree.tree_map_only(Tensor, Tensor.detach, value)


def describe(value: Any) -> str:
    """A short text for error messages: shapes and types, as in ``(float32[4, 8], None)``."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(describe(v) for v in value)
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + "}"
    return type(value).__name__ if value is not None else "None"
