"""Decides whether a captured graph can be replayed for a step."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import _C
from ..base.comparable import comparable
from ..base.tensors import dense_parts
from ..stages.context import CallerContext
from .batch import Batch


class NotCapturable(Exception):
    """No graph can hold the step; the text says why."""


class GraphKeys:
    """Finds a step's key: a graph captured in a step can be replayed for any step with the same key.

    The key holds the batch's shapes, types and values that are not tensors; the caller's context; which modules
    and parameters there are, and each module's mode; the addresses and shapes of parameters and buffers; which
    parameters require a gradient and which have one; an optimizer's settings and the addresses of its state.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer
        self._state = _C.ModelState(modules)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The modules' parameters when a key was last computed."""
        return self._state.parameters

    def of(
        self, leaves: Sequence[Any], spec: pytree.TreeSpec, batch: Batch, context: CallerContext
    ) -> Hashable:
        """The key of a step. ``leaves`` and ``spec``: the batch's inputs and target. Raises NotCapturable."""
        state = self._state.read()
        if self._state.hook is not None:
            raise NotCapturable(f"a parameter has a {self._state.hook}, which a replay would not call")
        return (
            spec,
            tuple(map(_key_of_leaf, leaves)),
            (batch.keep_outputs, batch.keep_losses, batch.record, context),
            state,
            tuple(map(_memory, self._state.others)),
            () if self._optimizer is None else _of_optimizer(self._optimizer),
        )

    def put_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Makes ``gradients`` the parameters' own, with the values that those have now.

        Call it after ``of``, with nothing in between that changes a ``.grad``.
        """
        others = self._state.put_gradients(gradients)
        if others:
            parameters = self.parameters
            for i in others:
                parameter, gradient = parameters[i], gradients[i]
                assert parameter.grad is not None and gradient is not None
                gradient.copy_(parameter.grad)
                parameter.grad = gradient


def check_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Raises NotCapturable for an optimizer whose steps may change in ways that a replay would miss."""
    if type(optimizer) is torch.optim.SGD:
        return
    if not all(group.get("capturable", False) for group in optimizer.param_groups):
        raise NotCapturable(f"{type(optimizer).__name__} is neither torch's SGD nor made with capturable=True")


def _key_of_leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        if leaf.requires_grad:
            raise NotCapturable("an input requires a gradient")
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    found = comparable(leaf)
    if found is None:
        raise NotCapturable(
            f"an input is a {type(leaf).__name__}, which cannot be compared with that of an earlier step"
        )
    return found


def _memory(tensor: Tensor) -> Hashable:
    """Where a tensor's values lie, and how they are read there."""
    return (
        type(tensor),
        tensor.shape,
        tuple(
            (part.data_ptr(), part.shape, part.stride(), part.dtype, part.device, part.is_conj(), part.is_neg())
            for part in dense_parts(tensor)
        ),
    )


def _of_optimizer(optimizer: torch.optim.Optimizer) -> Hashable:
    settings = [
        (name, _setting(value))
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    trained = [id(p) for group in optimizer.param_groups for p in group["params"]]
    state = [
        value.data_ptr()
        for of_one in optimizer.state.values()
        for value in of_one.values()
        if isinstance(value, Tensor)
    ]
    return tuple(settings), tuple(trained), tuple(state)


def _setting(value: Any) -> Hashable:
    """A setting as part of a key. A replay reads a GPU tensor again; other values are fixed in the graph."""
    return value.data_ptr() if isinstance(value, Tensor) and value.is_cuda else repr(value)
