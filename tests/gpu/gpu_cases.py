"""What tests on GPUs share: kinds of devices and streams, and models of all shapes."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import models
import torch
import torch.nn.functional as F
from random_orders import NAMED
from torch import nn
from torch.utils import _pytree as pytree

WIDTH = 16
# For four stages.
SINGLE = {"schedule": "interleaved-1f1b", "devices": ["cuda:0"], "overlap": False}
LANES = {"devices": ["cuda:0"] * 4}
GRAPHS = {"devices": ["cuda:0"] * 4, "graphs": True}
STAGES = 4
# With fewer stages for each rank a schedule asks for two.
RANKS = {name: STAGES // 2 for name in NAMED if "v" in name or "interleaved" in name or "looped" in name}
MODES: dict[str, dict[str, Any]] = {
    "single stream": {"devices": ["cuda:0"], "overlap": False},
    "lanes": {"devices": ["cuda:0"]},
    "two devices": {"devices": ["cuda:0", "cuda:1"]},
    "graphs": {"devices": ["cuda:0"], "graphs": True},
}


def on_ranks(mode: str, ranks: int) -> dict[str, Any]:
    """The options of a pipeline with so many ranks."""
    options = dict(MODES[mode])
    devices = options["devices"]
    return options | {"devices": [devices[rank * len(devices) // ranks] for rank in range(ranks)]}


class Case(NamedTuple):
    """A model in stages, its loss, and how to make a batch of so many rows."""

    stages: Callable[[int], list[nn.Module]]
    loss_fn: Callable[..., torch.Tensor]
    batch: Callable[[int], tuple[Any, Any]]


class Inner(nn.Module):
    """A skip connection within a stage, whose first value is used twice and in place at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        kept = torch.tanh(self.a(x))
        return self.b(kept).add_(kept).mul_(0.5)


def _tied(stages: int) -> list[nn.Module]:
    made: list[nn.Module] = [nn.Linear(WIDTH, WIDTH) for _ in range(stages)]
    made[-1].weight = made[0].weight
    return made


def _plain(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)


def _dropout(stages: int) -> list[nn.Module]:
    return [nn.Sequential(models.Residual(WIDTH), nn.Dropout(0.3)) for _ in range(stages)]


CASES = {
    "chain": Case(lambda n: list(models.chain(n, WIDTH).children())[: 2 * n : 2], F.mse_loss, _plain),
    "in place": Case(
        lambda n: [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True)) for _ in range(n)],
        F.mse_loss,
        _plain,
    ),
    "residual": Case(lambda n: [models.Residual(WIDTH) for _ in range(n)], F.mse_loss, _plain),
    "tree": Case(lambda n: list(models.tree(n)), models.tree_loss, models.tree_batch),
    "encoder and decoder": Case(lambda n: models.encoder_and_decoders(n, WIDTH), F.mse_loss, _plain),
    "tied": Case(_tied, F.mse_loss, _plain),
    "skip in a stage": Case(lambda n: [Inner() for _ in range(n)], F.mse_loss, _plain),
    "dropout": Case(_dropout, F.mse_loss, _plain),
}


def to_gpu(value: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), value)


def plain_twin(stages: list[nn.Module]) -> nn.Sequential:
    """The same model in one piece, on a GPU, with ties kept."""
    return nn.Sequential(*copy.deepcopy(stages)).cuda()
