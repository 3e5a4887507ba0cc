"""The whole model in one forward, with the random numbers that its stages draw."""

from collections.abc import Container
from typing import Any

from torch import nn

from ..microbatches.cutting import Arguments
from ..stages.drawing import branch
from .program import INPUTS
from .routing import Call, running


class _Whole:
    """A run that computes everything."""

    def __init__(self, units: Container[nn.Module]) -> None:
        self._units = units
        self._number = 0
        self._inside = False

    def call(self, unit: nn.Module, compute: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._inside or unit not in self._units:
            return compute(*args, **kwargs)
        self._inside = True
        try:
            with branch(self._number):
                return compute(*args, **kwargs)
        finally:
            self._inside = False
            self._number += 1


def run_whole(model: nn.Module, units: Container[nn.Module], arguments: Arguments) -> Any:
    """The output of a model with these units."""
    args, kwargs = arguments
    with running(_Whole(units)), branch(INPUTS):
        return model(*args, **kwargs)
