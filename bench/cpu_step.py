"""A training step on two CPU cores: this engine, torch.distributed.pipelining, and plain accumulation on one.

The contenders take turns in processes that live on: threads of one process for this engine, two gloo
processes of one thread each for torch. Writes bench/results/cpu_step.json.
"""

import argparse
import functools
import importlib
import statistics
import tempfile
import time
from pathlib import Path

import torch
from environment import write_results
from models import CASES, Case, loss_fn
from side_by_side import Contender, Run, one_thread_a_process, running, spread, wait_until_quiet
from torch import nn

OURS = {"1f1b": 2, "gpipe": 2, "interleaved-1f1b": 4}  # and the stages it takes
THEIRS = {"1F1B": 2, "GPipe": 2, "Interleaved1F1B": 4, "ZBVZeroBubble": 4}
IDEAL = ("1f1b", "gpipe")  # whose ideal speed-up on two ranks is 2 M / (M + 1)


def timed(step, model: nn.Module, begin=lambda: None, bound=lambda: None) -> Run:
    """For each step (begin, end, bound) in seconds of the machine's clock; the first of a burst is left out."""

    def run(steps: int) -> list[tuple[float, float, float | None]]:
        times = []
        for _ in range(steps + 1):
            model.zero_grad()
            begin()
            start = time.monotonic()
            step()
            times.append((start, time.monotonic(), bound()))
        return times[1:]

    return run


def plain(case: Case, microbatches: int, keep_memory: bool, rank: int) -> Run:
    torch.set_num_threads(1)
    if keep_memory:
        from pipeline_ext import _C

        _C.keep_freed_memory()
    model, (x, y) = case.model(), case.batch()

    def step() -> None:
        for a, b in zip(x.tensor_split(microbatches), y.tensor_split(microbatches)):
            (loss_fn(model(a), b) * (len(a) / len(x))).backward()

    return timed(step, model)


def ours(case: Case, microbatches: int, schedule: str, rank: int) -> Run:
    import pipeline_ext as pe

    torch.set_num_threads(1)
    model, (x, y) = case.model(), case.batch()
    pipe = pe.Pipeline(
        model,
        num_stages=OURS[schedule],
        microbatches=microbatches,
        schedule=schedule,
        loss_fn=loss_fn,
        devices=["cpu", "cpu"],
    )
    return timed(
        lambda: pipe.step(x, target=y), model, bound=lambda: pipe.simulate().makespan
    )


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
    stages = [
        PipelineStage(model[i * each : (i + 1) * each], i, count, torch.device("cpu")) for i in numbers
    ]
    make = get_schedule_class(schedule)
    runner = make(stages[0] if count == 2 else stages, microbatches, loss_fn=loss_fn)
    step = functools.partial(runner.step, return_outputs=False)
    if 0 in numbers:
        step = functools.partial(step, x)
    if count - 1 in numbers:
        step = functools.partial(step, target=y, losses=[])
    return timed(step, model, dist.barrier)


def measure(case: Case, microbatches: int, rounds: int, steps: int) -> list[dict]:
    """One row for each contender."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            ("plain", ""): Contender("plain", plain, case, microbatches, False),
            ("plain, memory kept", ""): Contender("kept", plain, case, microbatches, True),
            **{
                ("pipeline_ext", name): Contender(name, ours, case, microbatches, name)
                for name in OURS
            },
            **{
                ("torch", name): Contender(
                    name, theirs, case, microbatches, name, str(Path(folder) / name), ranks=2
                )
                for name in THEIRS
            },
        }
        seconds = {key: [] for key in contenders}
        bounds = {key: [] for key in contenders}
        with running(list(contenders.values())):
            quiet = wait_until_quiet()
            for _ in range(rounds):
                for key, contender in contenders.items():
                    spans = list(zip(*contender.run(steps)))
                    lasted = [max(s[1] for s in ranks) - min(s[0] for s in ranks) for ranks in spans]
                    seconds[key].append(statistics.median(lasted))
                    if spans[0][0][2] is not None:
                        shares = [ranks[0][2] / took for ranks, took in zip(spans, lasted)]
                        bounds[key].append(statistics.median(shares))
    rows = []
    for (engine, schedule), times in seconds.items():
        speedup = [one / two for one, two in zip(seconds["plain", ""], times)]
        row = {
            "model": case.name,
            "microbatches": microbatches,
            "engine": engine,
            "schedule": schedule,
            "quiet": quiet,
            "step_ms": spread([t * 1e3 for t in times]),
            "speedup": spread(speedup),
        }
        if schedule.lower() in IDEAL:
            ideal = 2 * microbatches / (microbatches + 1)
            row["share_of_ideal"] = spread([s / ideal for s in speedup])
        if bounds[engine, schedule]:
            row["share_of_simulated"] = spread(bounds[engine, schedule])
        rows.append(row)
    return rows


def show(row: dict) -> None:
    """One line."""
    figures = [f"{row['step_ms']['median']:9.2f} ms  speed-up {row['speedup']['median']:.2f}"]
    for key, text in (("share_of_ideal", "of ideal"), ("share_of_simulated", "of simulated")):
        if key in row:
            figures.append("{min:.2f} {median:.2f} {max:.2f} ".format(**row[key]) + text)
    print(
        f"{row['model']:12} M {row['microbatches']:2}  {row['engine']:19} {row['schedule']:17}",
        "  ".join(figures),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--microbatches", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    one_thread_a_process()
    rows = []
    for name in options.models:
        for microbatches in options.microbatches:
            steps = {"mlp": 3, "transformer": 1, "tiny": 20}[name]
            for row in measure(CASES[name], microbatches, options.rounds, steps):
                rows.append(row)
                show(row)
    write_results("cpu_step", rows=rows)


if __name__ == "__main__":
    main()
