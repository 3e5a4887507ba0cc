"""Modules in evaluation mode for a while."""

from collections.abc import Iterable

from torch import nn

from .. import _C


def evaluation_mode(roots: Iterable[nn.Module]) -> _C.EvaluationMode:
    """A context in which the modules, and all inside them, are in evaluation mode."""
    modules = dict.fromkeys(module for root in roots for module in root.modules())
    return _C.EvaluationMode([module for module in modules if module.training])
