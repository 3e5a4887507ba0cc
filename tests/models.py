"""Small models that exercise what stages may hand to one another."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe


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


class Repeated(nn.Module):
    """One layer, used several times."""

    def __init__(self, times, width=12):
        super().__init__()
        self.times = times
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        for _ in range(self.times):
            x = self.layer(x).tanh()
        return x


class Slices(nn.Module):
    """Writes to parts of a tensor in place, some of them made of a parameter alone."""

    def __init__(self, width=12):
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.scale, self.parts = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(2))

    def forward(self, x):
        y = self.layer(x).clone()
        y[:, 2:4] *= self.parts
        y[:, 0] = self.scale[0] * x[:, 1]
        y[:, 1] = self.parts[1]
        return y * self.scale


class Attention(nn.Module):
    """Three linear layers whose weights are parts of one parameter."""

    def __init__(self, width=12):
        super().__init__()
        self.inner = nn.MultiheadAttention(width, 2)

    def forward(self, x):
        return self.inner(x, x * 2, x.tanh())[0]


class Images(nn.Module):
    """Convolutions, batch norm, and a layer that works in place."""

    def __init__(self, width=12):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv1d(1, 3, 3, padding=1), nn.BatchNorm1d(3), nn.ReLU(inplace=True), nn.Conv1d(3, 1, 1)
        )

    def forward(self, x):
        return x + self.inner(x.unsqueeze(1)).squeeze(1)


class Constant(nn.Module):
    """Hands on a parameter beside its input."""

    def __init__(self, width=12):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x):
        if isinstance(x, tuple):
            x = x[0] * x[1]
        return x.sin(), self.bias


class ScaledProduct(torch.autograd.Function):
    """A backward in Python that computes all gradients at once."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad * weight, (grad * x).sum(0)


class AtOnce(nn.Module):
    """A layer whose backward finds both gradients at once, between two that are plain."""

    def __init__(self, width=12):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.weight = nn.Parameter(torch.randn(width))
        self.last = nn.Linear(width, width)

    def forward(self, x):
        return self.last(ScaledProduct.apply(self.first(x), self.weight))


class Recomputed(nn.Module):
    """Two layers, the first of which activation checkpointing recomputes. Counts its forwards."""

    def __init__(self, reentrant, width=12):
        super().__init__()
        self.reentrant = reentrant
        self.inner = Residual(width)
        self.last = nn.Linear(width, width)
        self.forwards = 0

    def counted(self, x):
        self.forwards += 1
        return self.inner(x)

    def forward(self, x):
        return self.last(checkpoint(self.counted, x, use_reentrant=self.reentrant))


class Encoder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        memory = self.linear(x)
        return torch.tanh(memory), memory * 1.0


class Decoder(nn.Module):
    """Hands the encoder's memory on as it is; all stages read it, and its gradient passes through them."""

    def __init__(self, width, is_last=False):
        super().__init__()
        self.linear, self.cross, self.is_last = nn.Linear(width, width), nn.Linear(width, width), is_last

    def forward(self, state):
        x, memory = state
        x = self.linear(x) + self.cross(memory)
        return x if self.is_last else (x, memory)


def encoder_and_decoders(stages, width=12):
    return [Encoder(width), *(Decoder(width, is_last=i == stages - 1) for i in range(1, stages))]


@pe.skips(stash=["mask"])
class _Masks(nn.Linear):
    def forward(self, x):
        pe.stash("mask", x > 0)
        return super().forward(x)


@pe.skips(pop=["mask"])
class _Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x) * pe.pop("mask")


def masked(width, stages):
    """The first stage's mask, which has no gradient, goes straight to the last."""
    kinds = [_Masks, *[nn.Linear] * (stages - 2), _Masked]
    return nn.Sequential(*(kind(width, width) for kind in kinds))
