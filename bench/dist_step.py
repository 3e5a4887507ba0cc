"""A training step in two gloo processes of one thread each: Pipeline(mesh=), the drop-in classes, and the peer.

All take turns with plain accumulation on one core. A process is bound to a core, as launchers of such jobs bind
theirs. Beside each step of ours stands what its plan promises: the plan simulated with the times that the
step's own processes measured. Writes bench/results/dist_step.json.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from models import Case, loss_fn
from side_by_side import Contender, Run, Span, in_turn, spread
from steps import IDEAL, plain, promised, row_of, run, theirs, timed

SCHEDULES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved-1f1b": "Interleaved1F1B", "zbv": "ZBVZeroBubble"}
DROP_IN = "pipeline_ext.pipelining"


def on_a_core(make: Callable[..., Run], *args: Any) -> Run:
    """``make(*args)`` in a process that keeps to one core, by its rank, the last of ``args``."""
    *_, rank = args
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    return make(*args)


def apart(case: Case, microbatches: int, store: str, rank: int) -> Run:
    """A whole step in each process, which begin together and exchange nothing: all that the cores give."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    return plain(case, microbatches, False, rank, begin=dist.barrier)


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


def promised_over_measured(
    microbatches: int, key: tuple[str, str], ranks: Sequence[Span], took: float
) -> float | None:
    """None but for Pipeline."""
    measured = [profile for _, _, profile in ranks]
    return None if None in measured else promised(key[1], microbatches, measured) / took


def measure(case: Case, microbatches: int, rounds: int, steps: int) -> list[dict]:
    """One row for each contender; few are there at a time, for idle ones wake now and then."""
    alone = Contender("plain", on_a_core, plain, case, microbatches, False)
    with tempfile.TemporaryDirectory() as folder:
        both = Contender("apart", on_a_core, apart, case, microbatches, str(Path(folder) / "store"), ranks=2)
        turns = in_turn({("plain", ""): alone, ("apart", ""): both}, rounds, steps)
    rows = [row_of(case, microbatches, key, turns) for key in turns.seconds]
    rows[-1]["speedup"] = {name: 2 * figure for name, figure in rows[-1]["speedup"].items()}  # two at once
    for name in SCHEDULES:
        rows += measure_schedule(case, microbatches, name, rounds, steps)
    return rows


def measure_schedule(case: Case, microbatches: int, name: str, rounds: int, steps: int) -> list[dict]:
    """One row for each of the three that run it."""
    contenders = {("plain", ""): Contender("plain", on_a_core, plain, case, microbatches, False)}
    with tempfile.TemporaryDirectory() as folder:
        for engine, make, known_as in (
            ("Pipeline", ours, name),
            ("drop-in", functools.partial(theirs, package=DROP_IN), SCHEDULES[name]),
            ("torch", theirs, SCHEDULES[name]),
        ):
            store = str(Path(folder) / engine)
            contenders[engine, name] = Contender(
                engine, on_a_core, make, case, microbatches, known_as, store, ranks=2
            )
        figure = functools.partial(promised_over_measured, microbatches)
        turns = in_turn(contenders, rounds, steps, figure)
    peer = turns.seconds["torch", name]
    rows = []
    for key in list(contenders)[1:]:
        row = row_of(case, microbatches, key, turns, "promised_over_measured")
        if key[0] != "torch":
            row["faster_than_torch"] = spread([other / own for other, own in zip(peer, turns.seconds[key])])
        rows.append(row)
    return rows


if __name__ == "__main__":
    run(measure, "dist_step", __doc__)
