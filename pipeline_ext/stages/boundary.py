"""Values that pass from one stage to the next.

A value is any pytree of tensors. In one process the receiver gets the sender's own tensors. Autograd is cut
between the stages, so that each stage's backward runs on its own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.flat import flatten, unflatten
from ..base.imported import is_dtensor
from ..base.memory import is_shared, share_memory
from ..base.tensors import differentiable
from ..errors import PipelineError


class Received:
    """A tensor that a stage received, and the gradient that its backward finds for it."""

    __slots__ = ("_version", "grad", "leaf")

    def __init__(self, leaf: Tensor) -> None:
        self.grad: Tensor | None = None
        self.leaf = leaf  # the received tensor, detached from the sender's graph
        leaf.__dict__["_of_a_boundary"] = True  # for ``reach``
        self._version = leaf._version

    def gradient(self) -> Tensor | None:
        """The gradient, in memory of its own. Call it once.

        Autograd may let it share memory with a parameter's gradient. The stage's next microbatch is added to
        that while the stage before still reads this one.
        """
        grad = self.leaf.grad if self.grad is None else self.grad
        self.grad = self.leaf.grad = None  # a graph that is kept for the weights' gradients holds this object
        if grad is None or grad.layout is not torch.strided:
            return grad
        if is_dtensor(grad):
            return grad.clone()
        return _copy(grad) if is_shared(grad) else grad

    def was_written(self) -> bool:
        """Whether the stage has changed the tensor in place."""
        return self.leaf._version != self._version

    def was_kept(self) -> bool:
        """Whether a leaf would have kept the gradient itself, without a copy into its own layout."""
        if self.leaf.layout is not torch.strided or not self.leaf.is_contiguous():
            return False
        return self.grad is None or (self.grad.layout is torch.strided and self.grad.is_contiguous())


class _Entry(torch.autograd.Function):
    """Ends a stage's backward: keeps the gradient in the memory layout in which it arrives.

    The result shares memory and version counter with the tensor, and may be changed in place.
    """

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, received: Received) -> Tensor:
        ctx.received = received
        ctx.set_materialize_grads(False)  # a missing gradient stays None, not zeros
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None]:
        ctx.received.grad = grad
        return None, None


# Function.apply without its Python code for functorch, which takes as long as all the rest.
_enter = super(torch.autograd.Function, _Entry).apply


class Entrance:
    """Where values enter a stage and autograd begins.

    A plain leaf costs least, but the stage may not change it in place. It also copies its gradient into its
    own memory layout, which can change bits downstream. So the first microbatch of each step enters through a
    function instead. If its backward shows that neither matters, those of the same shapes enter as leaves.
    """

    def __init__(self) -> None:
        self._leaves = False  # whether microbatches like the first may enter as leaves
        self._failed = False
        self.begin()

    def begin(self) -> None:
        """Prepares for a step."""
        self._leaves = False
        self._first: list[Received] | None = None  # of the step, until its backward has run
        self._shapes: list[torch.Size] | None = None

    def receive(self, value: Any, own: bool = False) -> tuple[Any, list[Received]]:
        """The value a stage works on, and what will hold the gradients of its tensors.

        There is one ``Received`` for each tensor of ``value`` that requires a gradient, in the order of
        ``differentiable(value)``, which the sender uses too. With ``own``, these tensors are copied.
        """
        tensors = differentiable(value)
        if self._leaves and [t.shape for t in tensors] == self._shapes:
            enter = _enter_as_leaf
        else:
            enter = _enter_through_function
        value, received = _receive(value, tensors, own, enter)
        if self._shapes is None:
            self._first, self._shapes = received, [t.shape for t in tensors]
        return value, received

    def returned(self, received: list[Received]) -> None:
        """Called when the backward of what was received has run."""
        if received and received is self._first:
            self._first = None  # which frees its memory
            if not self._failed:
                self._leaves = not any(r.was_written() or not r.was_kept() for r in received)

    def failed(self) -> None:
        """Called when a forward raised an error. A leaf may be the reason, so none are used any more."""
        self._failed = True
        self._leaves = False


Enter = Callable[[Tensor], tuple[Tensor, Received]]


def _enter_as_leaf(leaf: Tensor) -> tuple[Tensor, Received]:
    return leaf, Received(leaf)


def _enter_through_function(leaf: Tensor) -> tuple[Tensor, Received]:
    received = Received(leaf)
    return _enter(leaf, received), received


def _receive(value: Any, tensors: list[Tensor], own: bool, enter: Enter) -> tuple[Any, list[Received]]:
    def one(tensor: Tensor) -> tuple[Tensor, Received]:
        leaf = tensor.detach()
        return enter((leaf.clone() if own else leaf).requires_grad_())

    if not tensors:
        return value, []
    if value is tensors[0]:
        entered, received = one(value)
        return entered, [received]
    pairs = {id(tensor): one(tensor) for tensor in tensors}
    flat, spec = flatten(value)
    flat = [pairs[id(v)][0] if id(v) in pairs else v for v in flat]
    return unflatten(flat, spec), [received for _, received in pairs.values()]


def check_aliases(received: list[Received]) -> None:
    """Raises PipelineError if a stage wrote to one of several tensors that share memory.

    In an uncut graph, autograd would carry the change into the gradients of the others.
    """
    if len(received) < 2:
        return
    dense = [r for r in received if type(r.leaf) is Tensor and r.leaf.layout is torch.strided]
    for r in dense:
        if r.was_written() and any(share_memory([r.leaf, o.leaf]) for o in dense if o is not r):
            raise PipelineError(
                "a tensor was changed in place that shares memory with another one handed over at the same "
                "cut; autograd cannot follow this across a cut: hand over only one of them, or a clone"
            )


def _copy(grad: Tensor) -> Tensor:
    """A copy in new memory, with the same strides."""
    copied = grad.clone()
    if copied.stride() == grad.stride():
        return copied
    storage = grad.untyped_storage().clone()
    return torch.empty(0, dtype=grad.dtype, device=grad.device).set_(
        storage, grad.storage_offset(), grad.size(), grad.stride()
    )
