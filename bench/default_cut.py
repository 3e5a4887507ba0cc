"""The bubble of the default cut, simulated, beside that of the best of all cuts between the same calls.

Each model is cut by its own forward where the measured times of its calls balance. Times measured once more are
the costs of both simulations: a third of a call's time is its F, two thirds are its B. Writes
bench/results/default_cut.json.
"""

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from environment import write_results
from torch import Tensor, nn

import pipeline_ext as pe
from pipeline_ext.calls.timing import times
from pipeline_ext.model.untouched import untouched

MICROBATCHES = 8
STAGES = (2, 4)
SCHEDULES = ("1f1b", "zb-h1")


class Language(nn.Module):
    """A transformer whose embedding and head are as heavy as several layers."""

    def __init__(self, layers: int = 12, width: int = 128, words: int = 4096) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, words)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


class Pictures(nn.Module):
    """A convolutional network: resolution falls, width grows."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 16, 16, 32, 32, 64, 64, 128, 128]
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=1 if a == b else 2, padding=1), nn.ReLU())
            for a, b in itertools.pairwise(widths)
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, pictures: Tensor) -> Tensor:
        for block in self.blocks:
            pictures = block(pictures)
        return self.head(pictures.mean((2, 3))).logsumexp(1).mean()


class Growing(nn.Module):
    """Layers of which each is wider inside than the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(128, 128 * n), nn.GELU(), nn.Linear(128 * n, 128)) for n in range(1, 11)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.square().mean()


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]


CASES = {
    "language model": Case(Language, lambda: torch.randint(4096, (4 * MICROBATCHES, 64))),
    "convolutions": Case(Pictures, lambda: torch.randn(4 * MICROBATCHES, 3, 64, 64)),
    "growing layers": Case(Growing, lambda: torch.randn(64 * MICROBATCHES, 128)),
}


def seconds(starts: tuple[int, ...], of_calls: list[float], schedule: str) -> tuple[float, float]:
    """The simulated step and its bubble, a share of it."""
    ends = (*starts[1:], len(of_calls))
    of_stages = [sum(of_calls[a:b]) for a, b in zip(starts, ends)]
    forward, backward = [t / 3 for t in of_stages], [2 * t / 3 for t in of_stages]
    costs = pe.Costs(forward=forward, backward=backward, input_grad=forward, weight_grad=forward)
    plan = pe.build_plan(schedule, num_stages=len(starts), microbatches=MICROBATCHES)
    simulated = pe.simulate(plan, costs)
    return simulated.makespan, simulated.bubble


def measure(name: str, num_stages: int) -> list[dict]:
    """A row for each schedule."""
    torch.manual_seed(0)
    case = CASES[name]
    batch = case.batch()
    with pe.Pipeline(case.make(), num_stages, MICROBATCHES, sample=batch) as pipe:
        stages = pipe.stage_modules
        program = stages[0].program
        with untouched(program.model):
            of_calls = times(program, ((batch[: len(batch) // MICROBATCHES],), {}), repeats=5)
    default = tuple(stage.begin for stage in stages)
    every = [(0, *cut) for cut in itertools.combinations(range(1, len(of_calls)), num_stages - 1)]
    rows = []
    for schedule in SCHEDULES:
        step, bubble = seconds(default, of_calls, schedule)
        best = min(every, key=lambda starts: seconds(starts, of_calls, schedule)[0])
        best_step, best_bubble = seconds(best, of_calls, schedule)
        rows.append(
            {
                "model": name,
                "calls": len(of_calls),
                "stages": num_stages,
                "schedule": schedule,
                "cuts": len(every),
                "default": {"begins": default, "bubble": bubble},
                "best": {"begins": best, "bubble": best_bubble},
                "default_by_best": step / best_step,
            }
        )
    return rows


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, num_stages in itertools.product(CASES, STAGES):
        for row in measure(name, num_stages):
            rows.append(row)
            print(
                f"{name:15} {num_stages} stages {row['schedule']:6} bubble {row['default']['bubble']:.3f}, "
                f"best of {row['cuts']} cuts {row['best']['bubble']:.3f}; step {row['default_by_best']:.3f} of "
                "the best's",
                flush=True,
            )
    write_results("default_cut", rows=rows)
