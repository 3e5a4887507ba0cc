"""What makes two steps so alike that the graph of one does for the other."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..model.module_watch import ModuleWatch
from ..stages.context import CallerContext
from .batch import Batch

# What is no tensor and can be told from another by comparing.
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


class NoKind(Exception):
    """No graph can hold the step; the text says why."""


class StepKind:
    """Finds the kind of a step, as something to compare and to look up.

    In it are the batch's shapes, types and values that are no tensors; the caller's context; the mode of each
    module; where parameters and buffers lie, which require gradients and which have one; and an optimizer's
    settings and where its state lies.
    """

    def __init__(self, modules: Sequence[nn.Module], optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = optimizer
        self._watch = ModuleWatch(modules)
        self._find()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that the modules held when a kind was last found."""
        return self._parameters

    def of(
        self, leaves: Sequence[Any], spec: pytree.TreeSpec, batch: Batch, context: CallerContext
    ) -> Hashable:
        """``leaves`` and ``spec`` are of the batch's inputs and target. Raises NoKind."""
        if self._watch.changed():
            self._find()
        return (
            spec,
            tuple(map(_look, leaves)),
            (batch.keep_outputs, batch.keep_losses, batch.record, context),
            tuple((p.data_ptr(), p.requires_grad, p.grad is None) for p in self._parameters),
            tuple(b.data_ptr() for table in self._buffers for b in table.values() if b is not None),
            tuple(module.training for module in self._watch.modules),
            () if self._optimizer is None else _of_optimizer(self._optimizer),
        )

    def _find(self) -> None:
        self._parameters = self._watch.parameters()
        self._buffers = [module._buffers for module in self._watch.modules if module._buffers]


def check_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Raises NoKind for an optimizer whose steps may differ in what its graph would not show."""
    if type(optimizer) is torch.optim.SGD:
        return
    if not all(group.get("capturable", False) for group in optimizer.param_groups):
        raise NoKind(f"{type(optimizer).__name__} is neither torch's SGD nor made with capturable=True")


def _look(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        if leaf.requires_grad:
            raise NoKind("an input requires a gradient")
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if isinstance(leaf, _PLAIN):
        return type(leaf), leaf
    raise NoKind(f"an input is a {type(leaf).__name__}, of which nobody can tell whether it is as it was")


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
    """A tensor's value on the GPU is read in each replay; any other has been read once."""
    return value.data_ptr() if isinstance(value, Tensor) and value.is_cuda else repr(value)
