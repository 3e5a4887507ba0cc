"""The whole model in one forward, with the random numbers that its stages draw."""

from collections.abc import Container
from typing import Any

from torch import nn

from ..microbatches.cutting import Arguments
from ..stages.drawing import AROUND, Calls
from .routing import Call, running


class _Whole:
    """A run that computes everything."""

    def __init__(self, units: Container[nn.Module], random: Calls) -> None:
        self._units = units
        self._random = random
        self._number = 0

    def call(self, unit: nn.Module, compute: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        random = self._random
        if random.number != AROUND or unit not in self._units:
            return compute(*args, **kwargs)
        random.number = self._number
        try:
            return compute(*args, **kwargs)
        finally:
            random.number = AROUND
            self._number += 1


def run_whole(model: nn.Module, units: Container[nn.Module], arguments: Arguments) -> Any:
    """The output of a model with these units."""
    args, kwargs = arguments
    with Calls() as random, running(_Whole(units, random)):
        return model(*args, **kwargs)
