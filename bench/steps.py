"""Training steps of ``models.CASES``: contenders that several benchmarks have, their options and their rows."""

import argparse
import functools
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from environment import write_results
from models import CASES, Case, loss_fn
from side_by_side import Run, Span, Turns, one_thread_a_process, spread
from torch import nn

THEIRS = {"1F1B": 2, "GPipe": 2, "Interleaved1F1B": 4, "ZBVZeroBubble": 4}  # and the stages it takes
IDEAL = ("1f1b", "gpipe")  # whose ideal speed-up on two ranks is 2 M / (M + 1)
STEPS = {"mlp": 8, "transformer": 2, "tiny": 40}  # of a round, by model
FIGURES = ("share_of_ideal", "share_of_simulated", "faster_than_torch", "promised_over_measured")


def timed(
    step: Callable[[], object],
    model: nn.Module,
    begin: Callable[[], object] = lambda: None,
    measured: Callable[[], Any] = lambda: None,
) -> Run:
    """The spans of steps; the first of a burst is left out."""

    def run(steps: int) -> list[Span]:
        spans = []
        for _ in range(steps + 1):
            model.zero_grad()
            begin()
            start = time.monotonic()
            step()
            spans.append((start, time.monotonic(), measured()))
        return spans[1:]

    return run


def plain(
    case: Case,
    microbatches: int,
    keep_memory: bool,
    rank: int,
    begin: Callable[[], object] = lambda: None,
) -> Run:
    """Accumulation in one process of one thread."""
    torch.set_num_threads(1)
    if keep_memory:
        from pipeline_ext import _C

        _C.keep_freed_memory()
    model, (x, y) = case.model(), case.batch()

    def step() -> None:
        for a, b in zip(x.tensor_split(microbatches), y.tensor_split(microbatches)):
            (loss_fn(model(a), b) * (len(a) / len(x))).backward()

    return timed(step, model, begin)


def theirs(
    case: Case,
    microbatches: int,
    schedule: str,
    store: str,
    rank: int,
    package: str = "torch.distributed.pipelining",
) -> Run:
    """One of two processes. ``package``: the peer's, or what can be put in its place."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage

    get_schedule_class = importlib.import_module(f"{package}.schedules").get_schedule_class
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, (x, y) = case.model(), case.batch()
    count = THEIRS[schedule]
    numbers = {2: [rank], 4: [rank, 3 - rank] if schedule == "ZBVZeroBubble" else [rank, rank + 2]}[count]
    each = case.layers // count
    stages = [PipelineStage(model[i * each : (i + 1) * each], i, count, torch.device("cpu")) for i in numbers]
    make = get_schedule_class(schedule)
    runner = make(stages[0] if count == 2 else stages, microbatches, loss_fn=loss_fn)
    step = functools.partial(runner.step, return_outputs=False)
    if 0 in numbers:
        step = functools.partial(step, x)
    if count - 1 in numbers:
        step = functools.partial(step, target=y, losses=[])
    return timed(step, model, dist.barrier)


def promised(schedule: str, microbatches: int, of_ranks: Sequence[tuple[list[float], list[float]]]) -> float:
    """Seconds of a step by the times, of F and of B, that each process measured of its own stages."""
    import pipeline_ext as pe

    forward, backward = ([max(times) for times in zip(*of_kind)] for of_kind in zip(*of_ranks))
    plan = pe.build_plan(
        schedule, num_stages=len(forward), microbatches=microbatches, num_ranks=2, reactive=True
    )
    return pe.simulate(plan, pe.Costs(forward=forward, backward=backward)).makespan


def row_of(case: Case, microbatches: int, key: tuple[str, str], turns: Turns, figure: str = "") -> dict:
    """What is known of a contender. ``key``: engine and schedule; ``figure``: what those in ``turns`` are."""
    engine, schedule = key
    speedup = [one / two for one, two in zip(turns.seconds["plain", ""], turns.seconds[key])]
    row = {
        "model": case.name,
        "microbatches": microbatches,
        "engine": engine,
        "schedule": schedule,
        "quiet": turns.quiet,
        "step_ms": spread([t * 1e3 for t in turns.seconds[key]]),
        "speedup": spread(speedup),
    }
    if schedule.lower() in IDEAL:
        ideal = 2 * microbatches / (microbatches + 1)
        row["share_of_ideal"] = spread([s / ideal for s in speedup])
    if turns.figures[key]:
        row[figure] = spread(turns.figures[key])
    return row


def run(measure: Callable[[Case, int, int, int], list[dict]], name: str, description: str) -> None:
    """The program: ``measure(case, microbatches, rounds, steps)`` returns a row for each contender."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--microbatches", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    one_thread_a_process()
    rows = []
    for model in options.models:
        for microbatches in options.microbatches:
            for row in measure(CASES[model], microbatches, options.rounds, STEPS[model]):
                rows.append(row)
                _show(row)
    write_results(name, rows=rows)


def _show(row: dict) -> None:
    figures = [f"{row['step_ms']['median']:9.2f} ms  speed-up {row['speedup']['median']:.2f}"]
    figures += [
        name + " {min:.2f} {median:.2f} {max:.2f}".format(**row[name]) for name in FIGURES if name in row
    ]
    place = f"{row['model']:12} M {row['microbatches']:2}  {row['engine']:19} {row['schedule']:17}"
    print(place, "  ".join(figures), flush=True)
