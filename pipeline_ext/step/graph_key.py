"""Decides whether a captured graph can be replayed for a step."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..base.comparable import comparable
from ..model.module_watch import ModuleWatch
from ..stages.context import CallerContext
from .batch import Batch


class NotCapturable(Exception):
    """No graph can hold the step; the text says why."""


class GraphKeys:
    """Finds a step's key: a graph captured in a step can be replayed for any step with the same key.

    The key holds the batch's shapes, types and values that are not tensors; the caller's context; the mode of
    each module; the addresses of parameters and buffers; which parameters require a gradient and which have
    one; an optimizer's settings and the addresses of its state.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer
        self._watch = ModuleWatch(modules)
        self._find()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The modules' parameters when a key was last computed."""
        return self._parameters

    def of(
        self, leaves: Sequence[Any], spec: pytree.TreeSpec, batch: Batch, context: CallerContext
    ) -> Hashable:
        """The key of a step. ``leaves`` and ``spec``: the batch's inputs and target. Raises NotCapturable."""
        if self._watch.changed():
            self._find()
        if any(p._post_accumulate_grad_hooks for p in self._parameters):
            raise NotCapturable("a parameter has a post-accumulate-grad hook, which a replay would not call")
        return (
            spec,
            tuple(map(_key_of_leaf, leaves)),
            (batch.keep_outputs, batch.keep_losses, batch.record, context),
            tuple((p.data_ptr(), p.requires_grad, p.grad is None) for p in self._parameters),
            tuple(b.data_ptr() for table in self._buffers for b in table.values() if b is not None),
            tuple(module.training for module in self._watch.modules),
            () if self._optimizer is None else _of_optimizer(self._optimizer),
        )

    def _find(self) -> None:
        self._parameters = self._watch.parameters
        self._buffers = [module._buffers for module in self._watch.modules if module._buffers]


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
