"""A training step on two CPU cores: this engine, torch.distributed.pipelining, and plain accumulation on one.

The contenders take turns in processes that live on: threads of one process for this engine, two gloo
processes of one thread each for torch. Writes bench/results/cpu_step.json.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from models import Case, loss_fn
from side_by_side import Contender, Run, Span, in_turn
from steps import THEIRS, plain, row_of, run, theirs, timed

OURS = {"1f1b": 2, "gpipe": 2, "interleaved-1f1b": 4}  # and the stages it takes


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
    return timed(lambda: pipe.step(x, target=y), model, measured=lambda: pipe.simulate().makespan)


def share_of_simulated(key: tuple[str, str], ranks: Sequence[Span], took: float) -> float | None:
    """The step by its own profile, as part of what it took; None but for this engine."""
    _, _, makespan = ranks[0]
    return None if makespan is None else makespan / took


def measure(case: Case, microbatches: int, rounds: int, steps: int) -> list[dict]:
    """One row for each contender."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            ("plain", ""): Contender("plain", plain, case, microbatches, False),
            ("plain, memory kept", ""): Contender("kept", plain, case, microbatches, True),
            **{("pipeline_ext", name): Contender(name, ours, case, microbatches, name) for name in OURS},
            **{
                ("torch", name): Contender(
                    name, theirs, case, microbatches, name, str(Path(folder) / name), ranks=2
                )
                for name in THEIRS
            },
        }
        turns = in_turn(contenders, rounds, steps, share_of_simulated)
    return [row_of(case, microbatches, key, turns, "share_of_simulated") for key in contenders]


if __name__ == "__main__":
    run(measure, "cpu_step", __doc__)
