"""Values that pass from one stage to the next.

A value is any pytree of tensors. In one process its tensors are handed over themselves; autograd is cut
between the stages, so that each stage's backward runs on its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Received:
    """A tensor that a stage was given, and in the end the gradient that its backward found for it."""

    __slots__ = ("grad", "_leaf")

    def __init__(self, leaf: Tensor) -> None:
        self.grad: Tensor | None = None
        self._leaf = leaf

    def gradient(self) -> Tensor | None:
        """The gradient, in memory of its own.

        Autograd may let it share memory with a parameter's gradient, to which the stage's next microbatch
        is added while the stage before still reads this one.
        """
        grad = self._leaf.grad if self.grad is None else self.grad
        if grad is None or grad.layout is not torch.strided:
            return grad
        storage = grad.untyped_storage()
        shared = torch._C._storage_Use_Count(storage._cdata) > 2  # the gradient, and `storage` itself
        return grad.clone() if shared else grad


class _Probe(Received):
    """One that also tells whether a plain leaf would have done as well."""

    __slots__ = ("_version",)

    def __init__(self, leaf: Tensor) -> None:
        super().__init__(leaf)
        self._version = leaf._version

    def was_written(self) -> bool:
        """Whether the stage's forward has changed the tensor in place, which a leaf forbids."""
        return self._leaf._version != self._version

    def was_kept(self) -> bool:
        """Whether a leaf would have kept the gradient as it came, and not copied it into its own layout."""
        if self._leaf.layout is not torch.strided or not self._leaf.is_contiguous():
            return False
        return self.grad is None or (
            self.grad.layout is torch.strided and self.grad.is_contiguous()
        )


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


# Function.apply, without what it does in Python for functorch; that takes as long as all the rest.
_enter = super(torch.autograd.Function, _Entry).apply


class Entrance:
    """Where values enter a stage and autograd begins.

    A plain leaf costs least there, but may not be changed in place, and copies its gradient into its own
    memory layout, which can change bits downstream. So the first microbatch of each step enters behind a
    function instead; if it needs neither, later ones enter as leaves, until one does not.
    """

    def __init__(self) -> None:
        self._leaves = False  # whether the others may enter as leaves
        self._failed = False
        self._probes: list[_Probe] | None = None

    def begin(self) -> None:
        """Prepares for a step."""
        self._probes = None

    def receive(self, value: Any, own: bool = False) -> tuple[Any, list[Received]]:
        """The value a stage works on, and what will hold the gradients of its tensors.

        There is one ``Received`` for each tensor of ``value`` that requires a gradient, as
        ``differentiable(value)`` lists them for the stage that made it. With ``own`` such tensors are copied.
        """
        if self._probes is None:
            enter = _enter_probing
        elif self._leaves and not any(probe.was_written() for probe in self._probes):
            enter = _enter_as_leaf
        else:
            enter = _enter_behind_function
        value, received = _receive(value, own, enter)
        if self._probes is None:
            self._probes = received
        return value, received

    def returned(self, received: list[Received]) -> None:
        """The backward of what was received has run."""
        if received and received is self._probes and not self._failed:
            self._leaves = not any(probe.was_written() or not probe.was_kept() for probe in received)

    def failed(self) -> None:
        """A forward has raised an error. A leaf may have been the reason, so there are no more of them."""
        self._failed = True
        self._leaves = False


Enter = Callable[[Tensor], tuple[Tensor, Received]]


def _enter_as_leaf(leaf: Tensor) -> tuple[Tensor, Received]:
    return leaf, Received(leaf)


def _enter_behind_function(leaf: Tensor) -> tuple[Tensor, Received]:
    received = Received(leaf)
    return _enter(leaf, received), received


def _enter_probing(leaf: Tensor) -> tuple[Tensor, Received]:
    probe = _Probe(leaf)
    return _enter(leaf, probe), probe


def _receive(value: Any, own: bool, enter: Enter) -> tuple[Any, list[Received]]:
    def one(tensor: Tensor) -> tuple[Tensor, Received]:
        leaf = tensor.detach()
        return enter((leaf.clone() if own else leaf).requires_grad_())

    if isinstance(value, Tensor):
        if not value.requires_grad:
            return value, []
        entered, received = one(value)
        return entered, [received]
    flat, spec = pytree.tree_flatten(value)
    pairs = {id(tensor): one(tensor) for tensor in differentiable(flat)}
    flat = [pairs[id(v)][0] if id(v) in pairs else v for v in flat]
    return pytree.tree_unflatten(flat, spec), [received for _, received in pairs.values()]


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
