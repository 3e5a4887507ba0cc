"""A training step of a model that is cut by its own forward, beside the same layers given as a list of stages.

The contenders take turns in processes that live on; each has two stages on two threads, cut at the same layer.
CPU time is that of both threads: other programs of the machine change it less than the time on the clock.
Writes bench/results/any_model.json.
"""

import argparse
import time

import torch
from environment import write_results
from models import CASES, Case, loss_fn
from side_by_side import Contender, Run, in_turn, one_thread_a_process, spread
from steps import STEPS, timed
from torch import Tensor, nn

LIST, OWN = "a list of stages", "its own forward"
SCHEDULES = ("1f1b", "zb-h1")


class Looped(nn.Module):
    """The layers of a case, in a forward of its own."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def made(case: Case, microbatches: int, schedule: str, form: str, rank: int) -> Run:
    """One of the contenders."""
    import pipeline_ext as pe

    torch.set_num_threads(1)
    layers, (x, y) = case.model(), case.batch()
    half = case.layers // 2
    if form == LIST:
        model: nn.Module = layers
        pipe = pe.Pipeline([layers[:half], layers[half:]], 2, microbatches, schedule, loss_fn)
    else:
        model = Looped(layers)
        pipe = pe.Pipeline(model, 2, microbatches, schedule, loss_fn, sample=x, cuts=[f"layers.{half}"])
    begun = [0.0]

    def begin() -> None:
        begun[0] = time.process_time()

    return timed(lambda: pipe.step(x, target=y), model, begin, lambda: time.process_time() - begun[0])


def measure(case: Case, microbatches: int, schedule: str, rounds: int) -> dict:
    """The times of both forms, and how much longer the own forward takes, round by round."""
    contenders = {form: Contender(form, made, case, microbatches, schedule, form) for form in (LIST, OWN)}
    turns = in_turn(contenders, rounds, STEPS[case.name], lambda key, spans, seconds: spans[0][2])
    return {
        "model": case.name,
        "microbatches": microbatches,
        "schedule": schedule,
        "quiet": turns.quiet,
        "step_ms": {form: spread([t * 1e3 for t in turns.seconds[form]]) for form in contenders},
        "cpu_ms": {form: spread([t * 1e3 for t in turns.figures[form]]) for form in contenders},
        "own_by_list": spread(_ratios(turns.seconds)),
        "cpu_own_by_list": spread(_ratios(turns.figures)),
    }


def _ratios(by_form: dict) -> list[float]:
    return [own / of_list for own, of_list in zip(by_form[OWN], by_form[LIST])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    one_thread_a_process()
    rows = []
    for name in options.models:
        for schedule in SCHEDULES:
            rows.append(row := measure(CASES[name], 8, schedule, options.rounds))
            clock, cpu = (
                "{min:.3f} {median:.3f} {max:.3f}".format(**row[ratio])
                for ratio in ("own_by_list", "cpu_own_by_list")
            )
            print(f"{name:12} {schedule:6} own forward / list: clock {clock}, CPU {cpu}", flush=True)
    write_results("any_model", rows=rows)
