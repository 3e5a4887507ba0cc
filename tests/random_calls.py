"""Random models with a forward of their own: lists, loops, skips, masks, hooks, values without a gradient."""

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 6


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor, **_: Any) -> Tensor:
        return torch.tanh(self.linear(h))


class Pair(Plain):
    """Returns two values."""

    def forward(self, h: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        h = self.linear(h)
        return h, h.square().mean(-1)


class Integers(Plain):
    """Returns a value without a gradient."""

    def forward(self, h: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        h = self.linear(h)
        return h, h.argmax(-1)


class Keeps(Plain):
    """Keeps a loss in an attribute."""

    aux: Any = None

    def forward(self, h: Tensor, **_: Any) -> Tensor:
        h = self.linear(h)
        self.aux = h.square().mean()
        return h


class Writes(Plain):
    """Writes to a dict for later blocks."""

    def forward(self, h: Tensor, store: dict[str, Tensor], **_: Any) -> Tensor:
        h = self.linear(h) + store.get("last", 0.0)
        store["last"] = h * 2
        return h


class Noisy(Plain):
    """Draws random numbers."""

    def forward(self, h: Tensor, **_: Any) -> Tensor:
        return F.dropout(self.linear(h), 0.3, self.training)


class InPlace(nn.Module):
    def forward(self, h: Tensor, **_: Any) -> Tensor:
        return h.clone().mul_(0.5).relu_()


class Masked(Plain):
    def forward(self, h: Tensor, mask: Tensor, **_: Any) -> Tensor:
        return self.linear(h) * mask[:, None]


class Stack(nn.Module):
    """A list inside a member of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, h: Tensor, **_: Any) -> Tensor:
        return h + self.inner(h)


BLOCKS = [Plain, Pair, Integers, Keeps, Writes, Noisy, InPlace, Masked, Stack]
Glue = Callable[["Model", Tensor, Tensor], Tensor]


def _numpy(model: "Model", h: Tensor, first: Tensor) -> Tensor:
    return h + torch.from_numpy(first.detach().numpy()).abs()


def _no_grad(model: "Model", h: Tensor, first: Tensor) -> Tensor:
    with torch.no_grad():
        shift = first * 2
    return h + shift


def _written(model: "Model", h: Tensor, first: Tensor) -> Tensor:
    h = h * 1
    h[:, 0] = first[:, 1]
    return h


def _branch(model: "Model", h: Tensor, first: Tensor) -> Tensor:
    return h * 2 if bool(first.abs().sum() > 0) else h


def _collected(model: "Model", h: Tensor, first: Tensor) -> Tensor:
    return h + model.collected[0].mean() if model.collected else h


def _kept(model: "Model", h: Tensor, first: Tensor) -> Tensor:
    kept = [block.aux for block in model.blocks if getattr(block, "aux", None) is not None]
    return h + kept[0] if kept else h


GLUE: dict[str, Glue] = {
    "nothing": lambda model, h, first: h,
    "skip": lambda model, h, first: h + first,
    "detached": lambda model, h, first: h + first.detach(),
    "no_grad": _no_grad,
    "compared": lambda model, h, first: h * (first > 0),
    "item": lambda model, h, first: h * float(first.detach().abs().max()),
    "branch": _branch,
    "argmax": lambda model, h, first: h * (1 + first.argmax(-1, keepdim=True)),
    "numpy": _numpy,
    "in place": lambda model, h, first: (h * 1).mul_(2.0),
    "written": _written,
    "result in place": lambda model, h, first: h.mul_(0.5),
    "parameter": lambda model, h, first: h * model.scale,
    "a unit's parameter": lambda model, h, first: h + model.first.bias,
    "random": lambda model, h, first: h + 0.1 * torch.rand_like(h),
    "dropout": lambda model, h, first: F.dropout(h, 0.2, model.training),
    "collected": _collected,
    "kept": _kept,
}


class Model(nn.Module):
    """A forward that is drawn from a seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(draw.choice(BLOCKS)() for _ in range(draw.randint(3, 6)))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.collected: list[Tensor] = []
        self.glue = [draw.choice(list(GLUE)) if draw.random() < 0.6 else "nothing" for _ in self.blocks]
        self.order = [*range(len(self.blocks))]
        if draw.random() < 0.2:
            self.order.insert(draw.randrange(len(self.order)), draw.choice(self.order))  # a block runs twice
        if draw.random() < 0.2:
            self.head.weight = self.first.weight  # tied
        if draw.random() < 0.3:
            self.blocks[draw.randrange(len(self.blocks))].register_forward_hook(self._collect)
        self.collects = draw.random() < 0.5

    def _collect(self, module: nn.Module, args: Any, result: Any) -> None:
        self.collected.append(result[0] if isinstance(result, tuple) else result)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        self.collected = []
        for block in self.blocks:
            if isinstance(block, Keeps):
                block.aux = None
        mask = torch.ones(len(x)) if mask is None else mask
        h = first = self.first(x)
        first = first * 1
        store: dict[str, Tensor] = {}
        losses = []
        for index in self.order:
            h = self.blocks[index](h, mask=mask, store=store)
            if isinstance(h, tuple):
                h, other = h
                losses.append((other.float() * h.mean(-1)).mean())
            h = GLUE[self.glue[index]](self, h, first)
        if self.collects:
            losses += [value.square().mean() for value in self.collected]
        loss = self.head(h).square().mean()
        for other in losses:
            loss = loss + other
        return {"loss": loss, "h": h}
