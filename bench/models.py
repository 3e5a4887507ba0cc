"""What the benchmarks train: the same layers, data and loss for every contender."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model of equal layers, and a batch of [rows, *shape]."""

    name: str
    width: int
    layers: int
    rows: int
    time: int | None = None  # positions of a sequence; None: a perceptron

    def model(self) -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(*(self._layer() for _ in range(self.layers)))

    def batch(self) -> tuple[Tensor, Tensor]:
        shape = (self.rows, self.width) if self.time is None else (self.rows, self.time, self.width)
        generator = torch.Generator().manual_seed(1)
        return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)

    def _layer(self) -> nn.Module:
        if self.time is None:
            return nn.Sequential(nn.Linear(self.width, self.width), nn.GELU())
        return nn.TransformerEncoderLayer(
            self.width, 4, 4 * self.width, dropout=0.0, batch_first=True, norm_first=True
        )


CASES = {
    case.name: case
    for case in (
        Case("mlp", width=512, layers=8, rows=256),
        Case("transformer", width=256, layers=8, rows=32, time=64),
        Case("tiny", width=32, layers=8, rows=64),
    )
}

loss_fn = nn.functional.mse_loss
