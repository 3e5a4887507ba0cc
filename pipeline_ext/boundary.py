"""Values that pass from one stage to the next.

A value is any pytree of tensors. In one process its tensors are handed over themselves; autograd is
cut between the stages, so that each stage's backward runs on its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class _Identity(torch.autograd.Function):
    """Gives a leaf a successor that shares its memory and version but may be changed in place."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def receive(value: Any) -> tuple[Any, list[Tensor]]:
    """The value a stage works on, and the leaves at which its backward ends.

    There is one leaf for each tensor of ``value`` that requires a gradient, in pytree order: as
    ``differentiable(value)`` lists them for the stage that made it.
    """
    if isinstance(value, Tensor):
        return _receive_tensor(value, leaves := []), leaves
    flat, spec = pytree.tree_flatten(value)
    leaves = []
    received = [_receive_tensor(v, leaves) if isinstance(v, Tensor) else v for v in flat]
    return pytree.tree_unflatten(received, spec), leaves


def _receive_tensor(tensor: Tensor, leaves: list[Tensor]) -> Tensor:
    if not tensor.requires_grad:
        return tensor
    leaf = tensor.detach().requires_grad_()
    leaves.append(leaf)
    return _Identity.apply(leaf)


def differentiable(value: Any) -> list[Tensor]:
    """The tensors of ``value`` that require a gradient, in pytree order."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    return [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor) and v.requires_grad]


def gradient(leaf: Tensor) -> Tensor | None:
    """The gradient that a backward left at a leaf of ``receive``, in memory of its own.

    Autograd may let it share memory with a parameter's gradient, to which the stage's next microbatch is
    added while the stage before still reads this one.
    """
    grad = leaf.grad
    if grad is None or grad.layout is not torch.strided:
        return grad
    storage = grad.untyped_storage()
    shared = torch._C._storage_Use_Count(storage._cdata) > 2  # the gradient, and `storage` itself
    return grad.clone() if shared else grad


def detach(value: Any) -> Any:
    """``value`` with its tensors cut from autograd."""
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
