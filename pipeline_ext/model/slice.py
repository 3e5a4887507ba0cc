"""A stage made of consecutive layers."""

from collections.abc import Sequence
from typing import Any

from torch import nn


class Slice(nn.Module):
    """Consecutive layers of a model, run one after another.

    The first layer takes all that the stage is given, each other layer the result of the layer before.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.names = [name for name, _ in layers]
        self.layers = nn.ModuleList(layer for _, layer in layers)
        self._chain = list(self.layers)  # quicker to read than nn.ModuleList

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first, *rest = self._chain
        value = first(*args, **kwargs)
        for layer in rest:
            value = layer(value)
        return value

    def extra_repr(self) -> str:
        return f"{self.names[0]} .. {self.names[-1]}"
