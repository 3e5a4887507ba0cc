"""A stage's backward in two, I and W, with activation checkpointing and without.

Ours and that of torch.distributed.pipelining on one stage, in turn; beside them its backward as a whole, which
computes each layer again once. Writes bench/results/recompute.json.
"""

import argparse
import time
from collections.abc import Callable

import torch
from environment import write_results
from side_by_side import spread, wait_until_quiet
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint
from turns import take_turns

from pipeline_ext.stages.split_backward import find_input_gradients, run_backward

OURS, PEER, WHOLE = "pipeline_ext", "torch.distributed.pipelining", "the backward as a whole"
LAYERS, ROWS = 8, 256

Backward = Callable[[nn.Module, Tensor, Tensor, Tensor], None]  # of a stage: its input, output, and gradient


class Layer(nn.Module):
    """A residual layer; counts its forwards, and is recomputed if told so."""

    def __init__(self, width: int, recomputed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.recomputed = recomputed
        self.forwards = 0

    def compute(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.compute, x, use_reentrant=False) if self.recomputed else self.compute(x)


def whole(stage: nn.Module, received: Tensor, out: Tensor, grad: Tensor) -> None:
    run_backward([out], [grad])


def ours(stage: nn.Module, received: Tensor, out: Tensor, grad: Tensor) -> None:
    find_input_gradients([out], [grad], [received], stage.parameters, check=lambda: None).add()


def theirs(stage: nn.Module, received: Tensor, out: Tensor, grad: Tensor) -> None:
    _, groups = stage_backward_input([out], [grad], [received], stage.parameters())
    stage_backward_weight(stage.parameters(), groups)


BACKWARDS: dict[str, Backward] = {OURS: ours, PEER: theirs, WHOLE: whole}


def measure(width: int, recomputed: bool, rounds: int) -> dict:
    """One row: seconds of I and W together, and how often they compute a layer again."""
    torch.manual_seed(0)
    stage = nn.Sequential(*(Layer(width, recomputed) for _ in range(LAYERS)))
    x, grad = torch.randn(2, ROWS, width)
    again: dict[str, float] = {}

    def turn(name: str) -> float:
        stage.zero_grad()
        received = x.clone().requires_grad_()
        out = stage(received)
        before = sum(layer.forwards for layer in stage)
        begin = time.perf_counter()
        BACKWARDS[name](stage, received, out, grad)
        seconds = time.perf_counter() - begin
        again[name] = (sum(layer.forwards for layer in stage) - before) / LAYERS
        return seconds

    turns = {name: lambda n=name: turn(n) for name in BACKWARDS}
    take_turns(range(2), turns)
    seconds = take_turns(range(rounds), turns)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds[OURS])] for name in (PEER, WHOLE)}
    return {
        "width": width,
        "recomputed": recomputed,
        "recomputations_of_a_layer": again,
        "milliseconds": {name: spread([s * 1e3 for s in found]) for name, found in seconds.items()},
        "ours_is_faster_by": {name: spread(found) for name, found in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 256])
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet = wait_until_quiet()
    rows = []
    for width in options.widths:
        for recomputed in (False, True):
            row = measure(width, recomputed, options.rounds)
            rows.append(row)
            print(f"width {width}, {'checkpointed' if recomputed else 'plain'}")
            for name, times in row["milliseconds"].items():
                again = row["recomputations_of_a_layer"][name]
                print("  {:30} {min:8.2f} {median:8.2f} {max:8.2f} ms".format(name, **times), end="")
                print(f", computes a layer again {again:g} times")
    write_results("recompute", quiet=quiet, layers=LAYERS, rows_of_a_batch=ROWS, rows=rows)


if __name__ == "__main__":
    main()
