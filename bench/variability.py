"""A training step whose stages take varying times: ranks that react, ranks that keep their order, and the peer.

Four ranks, as threads of one process and as gloo processes. The stages wait instead of computing, so that a
machine with few cores carries them; every contender waits the same times in the same step. Beside each stands
the step as simulated with those very times. Writes bench/results/variability.json.
"""

import argparse
import functools
import importlib
import itertools
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import write_results
from side_by_side import Contender, Run, Span, in_turn, one_thread_a_process, spread
from torch import Tensor, nn

import pipeline_ext as pe

RANKS = 4
MICROBATCHES = 16
ROWS = 2  # of a microbatch
SLOTS = 8  # microbatches that a rank may hold where it finds how many: twice what the fullest does in 1F1B
MORE = "reactive, more slots"
ORDERED = "reactive, ordered"
SECONDS = {"F": 6e-3, "I": 6e-3, "W": 6e-3}  # of a rank and microbatch, in the mean
SCHEDULES = {"1f1b": "1F1B", "interleaved-1f1b": "Interleaved1F1B", "zb-h1": None}  # and the peer's name
PEER = "torch.distributed.pipelining"
DROP_IN = "pipeline_ext.pipelining"
KINDS = "FIW"

Factors = list[list[list[float]]]
"""By stage, microbatch and kind."""


def log_normal(cv: float, chance: random.Random) -> float:
    """A factor of mean 1."""
    variance = math.log1p(cv * cv)
    return math.exp(chance.gauss(-variance / 2, math.sqrt(variance)))


def independent(cv: float, chance: random.Random, stages: int) -> Factors:
    return [[[log_normal(cv, chance) for _ in KINDS] for _ in range(MICROBATCHES)] for _ in range(stages)]


def mixture(chance: random.Random, stages: int) -> Factors:
    """A microbatch is as long at every stage."""
    lengths = [chance.choices((1.0, 2.0, 6.0), (70, 20, 10))[0] for _ in range(MICROBATCHES)]
    return [[[length] * len(KINDS) for length in lengths] for _ in range(stages)]


def straggler(chance: random.Random, stages: int) -> Factors:
    slow = chance.randrange(RANKS)
    rows = independent(0.1, chance, stages)
    for stage in range(slow, stages, RANKS):
        rows[stage] = [[1.5 * factor for factor in of_kind] for of_kind in rows[stage]]
    return rows


SCENARIOS: dict[str, Callable[[random.Random, int], Factors]] = {
    "independent, cv 0.3": functools.partial(independent, 0.3),
    "independent, cv 1": functools.partial(independent, 1.0),
    "by microbatch": mixture,
    "a slow rank": straggler,
}


class Clock:
    """The factors of each step, which all contenders take from the same seeds."""

    def __init__(self, scenario: str, stages: int) -> None:
        self._draw = functools.partial(SCENARIOS[scenario], stages=stages)
        self._steps = itertools.count()
        self.begin()

    def begin(self) -> Factors:
        self.factors = self._draw(random.Random(next(self._steps)))
        return self.factors


class _Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


def _microbatch_of(value: Tensor) -> int:
    """Any, for a tensor by which the peer only asks for shapes."""
    first = torch.zeros(()) if value.is_meta else value.detach().flatten()[0]
    return int(first.nan_to_num(0).clamp(0, ROWS * MICROBATCHES - 1)) // ROWS


class Stage(nn.Module):
    """Waits in its forward, in the gradient of its input and in that of its weight; hands its input on."""

    def __init__(self, clock: Clock, stage: int, share: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._clock, self._stage, self._share = clock, stage, share

    def forward(self, value: Tensor) -> Tensor:
        factors = self._clock.factors[self._stage][_microbatch_of(value)]
        forward, of_input, of_weight = (
            self._share * SECONDS[kind] * factor for kind, factor in zip(KINDS, factors)
        )
        time.sleep(forward)
        return _Waits.apply(value, of_input) + _Waits.apply(self.weight, of_weight)


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def num_stages(schedule: str) -> int:
    return 2 * RANKS if schedule == "interleaved-1f1b" else RANKS


def stages_of(schedule: str, scenario: str) -> tuple[Clock, list[Stage]]:
    count = num_stages(schedule)
    clock = Clock(scenario, count)
    return clock, [Stage(clock, stage, RANKS / count) for stage in range(count)]


def batch() -> tuple[Tensor, Tensor]:
    rows = torch.arange(float(ROWS * MICROBATCHES)).view(-1, 1)  # each says which it is
    return rows.requires_grad_(), rows.detach()  # so that the first stage has an `I` too


def steps_of(
    clock: Clock, stages: list[Stage], step: Callable[[], object], barrier: Callable[[], object]
) -> Run:
    def run(steps: int) -> list[Span]:
        spans = []
        for _ in range(steps):
            for stage in stages:
                stage.zero_grad()
            barrier()
            start = time.monotonic()
            step()
            spans.append((start, time.monotonic(), clock.factors))
            clock.begin()
        return spans

    step()  # warms up, at the times of the first step
    return run


def ours(scenario: str, schedule: str, engine: str, store: str | None, rank: int) -> Run:
    torch.set_num_threads(1)
    mesh, barrier = None, lambda: None
    if store is not None:
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
        mesh, barrier = dist.group.WORLD, dist.barrier
    clock, stages = stages_of(schedule, scenario)
    options: dict[str, Any] = {"reactive": engine != "static", "mesh": mesh}
    if engine == MORE:
        options |= {
            "in_flight": "auto",
            "costs": pe.Costs(act_memory=1.0, memory_limit=SLOTS * len(stages) / RANKS),
        }
    pipe = pe.Pipeline(stages, len(stages), MICROBATCHES, schedule, loss_fn=loss_fn, **options)
    x, y = batch()

    def step() -> None:
        work = [factors[0] for factors in clock.factors[0]] if engine == ORDERED else None
        pipe.step(x, target=y, microbatch_work=work)

    return steps_of(clock, stages, step, barrier)


def theirs(scenario: str, schedule: str, package: str, store: str, rank: int) -> Run:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    clock, modules = stages_of(schedule, scenario)
    count = len(modules)
    mine = list(range(rank, count, RANKS))
    stages = [PipelineStage(modules[i], i, count, torch.device("cpu")) for i in mine]
    make = importlib.import_module(f"{package}.schedules").get_schedule_class(SCHEDULES[schedule])
    runner = make(stages if count > RANKS else stages[0], MICROBATCHES, loss_fn=loss_fn)
    x, y = batch()
    step = functools.partial(runner.step, return_outputs=False)
    if 0 in mine:
        step = functools.partial(step, x)
    if count - 1 in mine:
        step = functools.partial(step, target=y, losses=[])
    return steps_of(clock, modules, step, dist.barrier)


def costs_of(schedule: str, factors: Factors) -> pe.Costs:
    share = RANKS / num_stages(schedule)
    forward, of_input, of_weight = (share * SECONDS[kind] for kind in KINDS)
    table = [
        [[f, (of_input * i + of_weight * w) / (of_input + of_weight), i, w] for f, i, w in rows]
        for rows in factors
    ]
    return pe.Costs(
        forward=forward,
        backward=of_input + of_weight,
        input_grad=of_input,
        weight_grad=of_weight,
        microbatch=table,
    )


def promised(schedule: str, key: tuple[str, str], spans: Any, took: float) -> float | None:
    """The simulated step over the measured one."""
    ranks, engine = key
    if engine not in ("reactive", "static"):
        return None
    plan = pe.build_plan(
        schedule,
        num_stages=num_stages(schedule),
        num_ranks=RANKS,
        microbatches=MICROBATCHES,
        reactive=engine == "reactive",
    )
    costs = costs_of(schedule, spans[0][2])
    return pe.simulate(plan, costs, processes=ranks == "processes").makespan / took


def measure(scenario: str, schedule: str, rounds: int, steps: int) -> list[dict]:
    contenders = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in ("threads", "processes"):
            names = ["reactive", "static", MORE]
            if ranks == "threads" and scenario == "by microbatch":
                names.append(ORDERED)
            for name in names:
                store = str(Path(folder) / name) if ranks == "processes" else None
                args = (scenario, schedule, name, store)
                contenders[ranks, name] = Contender(name, ours, *args, ranks=RANKS if store else 1)
        for name, package in (("drop-in", DROP_IN), ("torch", PEER)):
            if SCHEDULES[schedule] is not None:
                args = (scenario, schedule, package, str(Path(folder) / name))
                contenders["processes", name] = Contender(name, theirs, *args, ranks=RANKS)
        turns = in_turn(contenders, rounds, steps, functools.partial(promised, schedule))
    rows = []
    for ranks, engine in contenders:
        row = {
            "scenario": scenario,
            "schedule": schedule,
            "ranks": ranks,
            "engine": engine,
            "quiet": turns.quiet,
            "step_ms": spread([seconds * 1e3 for seconds in turns.seconds[ranks, engine]]),
        }
        for other in ("static", "torch"):
            if other != engine and (ranks, other) in contenders and engine != "torch":
                pairs = zip(turns.seconds[ranks, other], turns.seconds[ranks, engine])
                row[f"faster_than_{other}"] = spread([theirs / ours for theirs, ours in pairs])
        if turns.figures[ranks, engine]:
            row["promised_over_measured"] = spread(turns.figures[ranks, engine])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    one_thread_a_process()
    rows = []
    for scenario in options.scenarios:
        for schedule in options.schedules:
            for row in measure(scenario, schedule, options.rounds, options.steps):
                rows.append(row)
                figures = [f"{row['step_ms']['median']:8.1f} ms"]
                figures += [
                    name + " {min:.2f} {median:.2f} {max:.2f}".format(**row[name])
                    for name in ("faster_than_static", "faster_than_torch", "promised_over_measured")
                    if name in row
                ]
                place = f"{scenario:20} {schedule:17} {row['ranks']:10} {row['engine']:21}"
                print(place, "  ".join(figures), flush=True)
    medians = [row["faster_than_static"]["median"] for row in rows if row["engine"] == "reactive"]
    print(f"reactive over static, median of medians {statistics.median(medians):.3f}")
    write_results("variability", ranks=RANKS, microbatches=MICROBATCHES, seconds=SECONDS, rows=rows)


if __name__ == "__main__":
    main()
