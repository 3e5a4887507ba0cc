"""Pipelines drawn at random: models whose stages dawdle, with skips past stages, and all that orders a step."""

import random
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from reference import twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext import _C

WIDTH = 8
NAMES = [name for name in _C.schedule_names() if name != "dualpipe"]  # which has a second copy of the stages


def dawdle(chance: random.Random | None) -> None:
    """Takes up to two milliseconds."""
    if chance is not None:
        time.sleep(chance.choice((0, 0, 1e-4, 5e-4, 2e-3)))


class Delay(torch.autograd.Function):
    """What goes through dawdles on its way back."""

    @staticmethod
    def forward(ctx, x, chance):
        ctx.chance = chance
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        dawdle(ctx.chance)
        return grad, None


@pe.skips(stash=lambda layer: layer.stashes, pop=lambda layer: layer.pops)
class Dawdling(nn.Module):
    """A layer that ends skips and begins some, and of which F, I and W take random times, if any."""

    def __init__(self, chance: random.Random | None, stashes: list[str], pops: list[str]) -> None:
        super().__init__()
        self.chance, self.stashes, self.pops = chance, stashes, pops
        self.linear = nn.Linear(WIDTH * (1 + len(pops)), WIDTH)

    def forward(self, x):
        dawdle(self.chance)
        x = torch.cat([Delay.apply(x, self.chance), *map(pe.pop, self.pops)], 1)
        weight = Delay.apply(self.linear.weight, self.chance)
        x = F.linear(x, weight, self.linear.bias).tanh()
        for name in self.stashes:
            pe.stash(name, x)
        return x * 2


def stages_of(name: str, ranks: int) -> int:
    """So many stages has a schedule here."""
    return ranks if _C.layout_of(name) == "linear" else 2 * ranks


@dataclass
class Run:
    """A pipeline to make: ``Pipeline(model, **options)``, and how many rows to give it."""

    model: nn.Sequential
    options: dict[str, Any]
    rows: int

    @property
    def plain(self) -> nn.Sequential:
        """A twin of the model that does not dawdle."""
        model = twin(self.model)
        for layer in model:
            layer.chance = None
        return model


def draw(chance: random.Random, ranks: int, most: int = 8) -> Run:
    """One run over so many ranks, of at most so many microbatches."""
    name = chance.choice(NAMES)
    stages, microbatches = stages_of(name, ranks), chance.randint(1, most)
    skips = {f"skip {i}": sorted(chance.choices(range(stages), k=2)) for i in range(chance.randint(0, 2))}
    layers = [
        Dawdling(
            random.Random(chance.random()) if chance.random() < 0.5 else None,
            [skip for skip, (source, target) in skips.items() if stage == source < target],
            [skip for skip, (source, target) in skips.items() if source < target == stage],
        )
        for stage in range(stages)
    ]

    def k() -> int | str:
        return chance.choice((1, 1, 2, 3, "all")) if microbatches > 2 else 1

    options = {
        "num_stages": stages,
        "microbatches": microbatches,
        "schedule": name,
        "overlap": chance.random() < 0.5,
        "reactive": chance.random() < 0.5,
        "pack": k(),
        "pack_forward": k(),
        "pack_skips": {skip: k() for skip, (source, target) in skips.items() if source < target},
        "in_flight": chance.choice((None, None, stages, [chance.randint(1, stages) for _ in range(stages)])),
    }
    return Run(nn.Sequential(*layers), options, microbatches + chance.randint(0, 7))
