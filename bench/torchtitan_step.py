"""A training step of torchtitan 0.3.0: its Llama of debug size in two gloo processes, each on a core.

The drop-in and torch's own schedules take turns; torchtitan's code is the same for both. Writes
bench/results/torchtitan_step.json.
"""

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import titan
import torch
from environment import write_results
from side_by_side import Contender, Run, Span, in_turn, one_thread_a_process, spread

LENGTH = 128  # tokens of a row
# Torch's split backward runs twice through a layer, which selective checkpointing refuses.
REFUSED = {(schedule, "selective checkpointing") for schedule in ("InterleavedZeroBubble", "ZBVZeroBubble")}


def client(package: str, schedule: str, wrap: str, store: str, rank: int) -> Run:
    """One of the two processes."""
    import torch.distributed as dist

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    titan.use(package)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    made, batch = titan.make(schedule, wrap), titan.batch(LENGTH)

    def run(steps: int) -> list[Span]:
        spans = []
        for _ in range(steps + 1):  # the first is left out
            for part in made.parts:
                part.zero_grad()
            dist.barrier()
            start = time.monotonic()
            made.step(*batch)
            spans.append((start, time.monotonic(), None))
        return spans[1:]

    return run


def measure(schedule: str, wrap: str, rounds: int, steps: int) -> dict:
    """One row."""
    packages = [titan.OURS] if (schedule, wrap) in REFUSED else [titan.OURS, titan.TORCH]
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            package: Contender(package, client, package, schedule, wrap, str(Path(folder) / package), ranks=2)
            for package in packages
        }
        turns = in_turn(contenders, rounds, steps)
    seconds = turns.seconds
    row = {
        "schedule": schedule,
        "wrap": wrap,
        "quiet": turns.quiet,
        "step_ms": {package: spread([s * 1e3 for s in seconds[package]]) for package in packages},
    }
    if len(packages) == 2:
        faster = [theirs / ours for ours, theirs in zip(seconds[titan.OURS], seconds[titan.TORCH])]
        row["faster_than_torch"] = spread(faster)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--schedules", nargs="+", default=list(titan.SCHEDULES), choices=titan.SCHEDULES)
    parser.add_argument("--wraps", nargs="+", default=list(titan.WRAPS), choices=titan.WRAPS)
    options = parser.parse_args()
    one_thread_a_process()
    rows = []
    for schedule, wrap in itertools.product(options.schedules, options.wraps):
        row = measure(schedule, wrap, options.rounds, options.steps)
        rows.append(row)
        print(f"{schedule}, {wrap}")
        for package, figures in row["step_ms"].items():
            print("  {:30} {min:8.1f} {median:8.1f} {max:8.1f} ms".format(package, **figures))
        if "faster_than_torch" in row:
            print(
                "  {:30} {min:8.2f} {median:8.2f} {max:8.2f}".format("faster by", **row["faster_than_torch"]),
                flush=True,
            )
    write_results("torchtitan_step", length=LENGTH, microbatches=titan.MICROBATCHES, rows=rows)


if __name__ == "__main__":
    main()
