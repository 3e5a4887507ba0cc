"""A training step in two gloo processes of one thread each: Pipeline(mesh=), the drop-in classes, and the peer.

All take turns with plain accumulation on one core. A process is bound to a core, as launchers of such jobs bind
theirs. Beside each step of ours stands what its plan promises: the
plan simulated with the times that the step's own processes measured. Writes bench/results/dist_step.json.
"""

import argparse
import functools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cpu_step import IDEAL, plain, theirs, timed
from environment import write_results
from models import CASES, Case, loss_fn
from side_by_side import Contender, Run, one_thread_a_process, running, spread, wait_until_quiet

SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved-1f1b": "Interleaved1F1B", "zbv": "ZBVZeroBubble"}
DROP_IN = "pipeline_ext.pipelining"


def on_a_core(make: Callable[..., Run], *args: Any) -> Run:
    """``make(*args)`` in a process that keeps to one core, by its rank, the last of ``args``."""
    *_, rank = args
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    return make(*args)


def ours(case: Case, microbatches: int, schedule: str, store: str, rank: int) -> Run:
    import torch.distributed as dist

    import pipeline_ext as pe

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model, (x, y) = case.model(), case.batch()
    pipe = pe.Pipeline(
        model,
        2 if schedule in IDEAL else 4,
        microbatches,
        schedule,
        loss_fn,
        mesh=dist.group.WORLD,
    )

    def measured() -> tuple[list[float], list[float]]:
        profile = pipe.profile()
        return profile.forward, profile.backward

    return timed(lambda: pipe.step(x, target=y), model, dist.barrier, measured)


def promised(schedule: str, microbatches: int, of_ranks: list) -> float:
    """Seconds of a step by the times that each process measured of its own stages."""
    import pipeline_ext as pe

    forward, backward = ([max(times) for times in zip(*of_kind)] for of_kind in zip(*of_ranks))
    plan = pe.build_plan(
        schedule, num_stages=len(forward), microbatches=microbatches, num_ranks=2, reactive=True
    )
    return pe.simulate(plan, pe.Costs(forward=forward, backward=backward)).makespan


def measure(case: Case, microbatches: int, rounds: int, steps: int) -> list[dict]:
    """One row for each contender."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = {("plain", ""): Contender("plain", on_a_core, plain, case, microbatches, False)}
        for name, theirs_name in SCHEDULES.items():
            for engine, make, known_as in (
                ("Pipeline", ours, name),
                ("drop-in", functools.partial(theirs, package=DROP_IN), theirs_name),
                ("torch", theirs, theirs_name),
            ):
                store = str(Path(folder) / f"{engine} {name}")
                contenders[engine, name] = Contender(
                    name, on_a_core, make, case, microbatches, known_as, store, ranks=2
                )
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
        promises: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
        with running(list(contenders.values())):
            quiet = wait_until_quiet()
            for _ in range(rounds):
                for key, contender in contenders.items():
                    spans = list(zip(*contender.run(steps)))
                    lasted = [max(s[1] for s in ranks) - min(s[0] for s in ranks) for ranks in spans]
                    seconds[key].append(statistics.median(lasted))
                    if spans[0][0][2] is not None:
                        shares = [
                            promised(key[1], microbatches, [s[2] for s in ranks]) / took
                            for ranks, took in zip(spans, lasted)
                        ]
                        promises[key].append(statistics.median(shares))
    return [
        _row(case, microbatches, key, times, seconds, promises[key], quiet) for key, times in seconds.items()
    ]


def _row(
    case: Case,
    microbatches: int,
    key: tuple[str, str],
    times: list[float],
    seconds: dict[tuple[str, str], list[float]],
    promises: list[float],
    quiet: bool,
) -> dict:
    engine, schedule = key
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
    if schedule in IDEAL:
        ideal = 2 * microbatches / (microbatches + 1)
        row["share_of_ideal"] = spread([s / ideal for s in speedup])
    if engine in ("Pipeline", "drop-in"):
        row["faster_than_torch"] = spread(
            [peer / own for peer, own in zip(seconds["torch", schedule], times)]
        )
    if promises:
        row["promised_over_measured"] = spread(promises)
    return row


def show(row: dict) -> None:
    """One line."""
    figures = [f"{row['step_ms']['median']:9.2f} ms  speed-up {row['speedup']['median']:.2f}"]
    for name in ("share_of_ideal", "faster_than_torch", "promised_over_measured"):
        if name in row:
            figures.append(f"{name} " + "{min:.2f} {median:.2f} {max:.2f}".format(**row[name]))
    place = f"{row['model']:12} M {row['microbatches']:2}  {row['engine']:9} {row['schedule']:17}"
    print(place, "  ".join(figures), flush=True)


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
    write_results("dist_step", rows=rows)


if __name__ == "__main__":
    main()
