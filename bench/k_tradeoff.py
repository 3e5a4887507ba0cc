"""How long a step takes with K gradients in a message, where each message costs its sender time.

Real steps over K, beside what the simulator predicts from the steps of K = 1, and the K that pack="auto"
takes. What a message costs is imitated: the sender waits. Pipelines of every K take turns, step by step.
Writes bench/results/k_tradeoff.json.
"""

import argparse
import contextlib
import io
import time

import torch
from environment import write_results
from side_by_side import spread, wait_until_quiet
from torch import Tensor, nn

import pipeline_ext as pe
from pipeline_ext.plan.profile import fastest
from pipeline_ext.transport.link import LocalLink, imitated_link

MICROBATCHES = 32
KS = (1, 2, 4, 8, 32)
SHARES = (0.0, 0.1, 0.5, 1.0)  # of an F, that a message costs
WIDTH = 512


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        time.sleep(0.002)
        return x * 1

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        time.sleep(0.004)
        return grad


class Wait(nn.Module):
    """A stage on a device of its own, as far as the host can see: it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return _Wait.apply(x * self.scale)


def waiting() -> list[nn.Module]:
    return [Wait() for _ in range(4)]


def mlp() -> list[nn.Module]:
    """Two stages, the second the longer one, so that its messages count."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(8)]
    return [nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])]


CASES = {"4 ranks that wait": waiting, "2 ranks, perceptron": mlp}


def pipeline(stages: list[nn.Module], pack: int | str, overhead: float) -> pe.Pipeline:
    with imitated_link(LocalLink(overhead)):
        return pe.Pipeline(stages, microbatches=MICROBATCHES, loss_fn=nn.functional.mse_loss, pack=pack)


def measure(name: str, share: float, rounds: int) -> dict:
    """The steps of one case at one overhead."""
    make, rows = CASES[name], 16 * MICROBATCHES
    x, y = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)

    def timed(pipe: pe.Pipeline) -> float:
        begin = time.perf_counter()
        pipe.step(x, target=y)
        return time.perf_counter() - begin

    with contextlib.ExitStack() as stack:
        free = stack.enter_context(pipeline(make(), 1, 0.0))
        for _ in range(3):
            timed(free)
        overhead = share * max(free.profile().forward)
        pipes: dict[int | str, pe.Pipeline] = {
            k: stack.enter_context(pipeline(make(), k, overhead)) for k in (*KS, "auto")
        }
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for pipe in pipes.values():
                for _ in range(4):
                    timed(pipe)
        times: dict[int | str, list[float]] = {k: [] for k in pipes}
        profiles = []
        for _ in range(rounds):
            for k, pipe in pipes.items():
                times[k].append(timed(pipe))
            profiles.append(pipes[1].profile())
        costs = fastest(profiles)
        predicted = {k: pe.simulate(pipe.plan, costs.costs(pipe.plan)).makespan for k, pipe in pipes.items()}
        chosen = pipes["auto"].plan.packs
    medians = {k: spread(times[k])["median"] for k in pipes}
    best = min(KS, key=medians.__getitem__)
    return {
        "case": name,
        "overhead_share_of_f": share,
        "overhead_ms": overhead * 1e3,
        "chosen": chosen,
        "best_k": best,
        # of one round, so that a slow minute hits both
        "chosen_over_best": spread([a / b for a, b in zip(times["auto"], times[best])]),
        "by_k": [
            {
                "k": k,
                "step_ms": {which: t * 1e3 for which, t in spread(times[k]).items()},
                "predicted_ms": predicted[k] * 1e3,
                "in_flight": pipes[k].plan.limits,
            }
            for k in pipes
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet = wait_until_quiet()
    rows = []
    for name in CASES:
        for share in SHARES:
            row = measure(name, share, options.rounds)
            rows.append(row)
            print(f"{name}, a message costs {share:.0%} of an F ({row['overhead_ms']:.2f} ms)")
            for by_k in row["by_k"]:
                print(
                    f"  K {by_k['k']!s:>4}  measured {by_k['step_ms']['median']:7.1f} ms"
                    f"  predicted {by_k['predicted_ms']:7.1f} ms  in flight {by_k['in_flight']}"
                )
            over = row["chosen_over_best"]
            print(f"  chosen {row['chosen']}, best {row['best_k']}: {over['median']:.3f} of its time")
    write_results("k_tradeoff", quiet=quiet, microbatches=MICROBATCHES, rows=rows)


if __name__ == "__main__":
    main()
