"""Values that pass from one stage to the next.

A value is any pytree of tensors. In one process its tensors are handed over themselves; autograd is cut
between the stages, so that each stage's backward runs on its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Received:
    """A tensor that a stage was given, and in the end the gradient that its backward found for it."""

    __slots__ = ("grad",)

    def __init__(self) -> None:
        self.grad: Tensor | None = None

    def gradient(self) -> Tensor | None:
        """The gradient, in memory of its own.

        Autograd may let it share memory with a parameter's gradient, to which the stage's next microbatch
        is added while the stage before still reads this one.
        """
        grad = self.grad
        if grad is None or grad.layout is not torch.strided:
            return grad
        storage = grad.untyped_storage()
        shared = torch._C._storage_Use_Count(storage._cdata) > 2  # the gradient, and `storage` itself
        return grad.clone() if shared else grad


class _Entry(torch.autograd.Function):
    """Where a stage's backward ends: keeps the gradient as it comes, in its own memory layout.

    The result shares memory and version with the tensor but may be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, received: Received) -> Tensor:
        ctx.received = received
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        ctx.received.grad = grad
        return None, None


def receive(value: Any, own: bool = False) -> tuple[Any, list[Received]]:
    """The value a stage works on, and what will hold the gradients of its tensors.

    There is one ``Received`` for each tensor of ``value`` that requires a gradient, as
    ``differentiable(value)`` lists them for the stage that made it. With ``own`` such tensors are copied.
    """
    entered: dict[int, tuple[Tensor, Received]] = {}

    def enter(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        if id(tensor) not in entered:
            received = Received()
            leaf = tensor.detach()
            leaf = (leaf.clone() if own else leaf).requires_grad_()
            entered[id(tensor)] = _Entry.apply(leaf, received), received
        return entered[id(tensor)][0]

    if isinstance(value, Tensor):
        value = enter(value)
    else:
        flat, spec = pytree.tree_flatten(value)
        flat = [enter(v) if isinstance(v, Tensor) else v for v in flat]
        value = pytree.tree_unflatten(flat, spec)
    return value, [received for _, received in entered.values()]


def differentiable(value: Any) -> list[Tensor]:
    """The tensors of ``value`` that require a gradient, in pytree order, each once."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    tensors = (v for v in pytree.tree_leaves(value) if isinstance(v, Tensor) and v.requires_grad)
    return list({id(tensor): tensor for tensor in tensors}.values())


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
