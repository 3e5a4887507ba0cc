"""Small models that exercise what stages may hand to one another."""

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def chain(layers=8, width=12):
    """A tensor between stages; layers that work in place at every second cut."""
    modules = []
    for i in range(layers):
        modules.append(Residual(width) if i % 2 else nn.Linear(width, width))
        modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


class TreeLayer(nn.Module):
    """A dictionary between stages: a hidden state, a mask and ids without gradient, a residual."""

    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.table = nn.Embedding(5, width)

    def forward(self, state):
        if not isinstance(state, dict):
            x, ids = state
            state = {"h": x, "skip": (x * 2,), "mask": x > 0, "ids": ids}
        h = self.mix(state["h"]) + self.table(state["ids"])
        h = torch.where(state["mask"], h, h * 0.5)
        return {"h": h, "skip": (state["skip"][0] + h,), "mask": state["mask"], "ids": state["ids"]}


def tree(layers=4, width=6):
    return nn.Sequential(*(TreeLayer(width) for _ in range(layers)))


def tree_loss(state, target):
    return F.mse_loss(state["h"], target["h"]) + (state["skip"][0] * target["scale"]).mean()


def tree_batch(rows, width=6):
    x = (torch.randn(rows, width), torch.randint(5, (rows,)))
    y = {"h": torch.randn(rows, width), "scale": torch.randn(rows, width)}
    return x, y
