"""A training step of torchtitan 0.3.0: its Llama of debug size in two gloo processes, each on a core.

The drop-in and torch's own schedules take turns; torchtitan's code is the same for both. Writes
bench/results/torchtitan_step.json.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path

import titan
import torch
from environment import write_results
from side_by_side import Contender, Run, Span, one_thread_a_process, running, spread, wait_until_quiet

LENGTH = 128  # tokens of a row
# Torch's split backward runs twice through a layer, which selective checkpointing refuses.
REFUSED = {(schedule, "selective checkpointing") for schedule in ("InterleavedZeroBubble", "ZBVZeroBubble")}


def wraps_of(package: str, schedule: str) -> list[str]:
    """Those with which it runs."""
    return [wrap for wrap in titan.WRAPS if package == titan.OURS or (schedule, wrap) not in REFUSED]


def client(package: str, schedule: str, steps: int, store: str, rank: int) -> Run:
    """One of the two processes. What it returns runs ``steps`` steps of the wrap with a number."""
    import torch.distributed as dist

    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    titan.use(package)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    clients, batch = [titan.make(schedule, wrap) for wrap in wraps_of(package, schedule)], titan.batch(LENGTH)

    def run(number: int) -> list[Span]:
        made, spans = clients[number], []
        for _ in range(steps + 1):  # the first is left out
            for part in made.parts:
                part.zero_grad()
            dist.barrier()
            start = time.monotonic()
            made.step(*batch)
            spans.append((start, time.monotonic(), None))
        return spans[1:]

    return run


def measure(schedule: str, rounds: int, steps: int) -> list[dict]:
    """A row for each wrap."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            package: Contender(package, client, package, schedule, steps, str(Path(folder) / package), ranks=2)
            for package in (titan.OURS, titan.TORCH)
        }
        seconds: dict[str, dict[str, list[float]]] = {wrap: {} for wrap in titan.WRAPS}
        with running(list(contenders.values())):
            quiet = wait_until_quiet()
            for _ in range(rounds):
                for wrap, (package, contender) in itertools.product(titan.WRAPS, contenders.items()):
                    if wrap in wraps_of(package, schedule):
                        spans = zip(*contender.run(wraps_of(package, schedule).index(wrap)))
                        lasted = [max(s[1] for s in ranks) - min(s[0] for s in ranks) for ranks in spans]
                        seconds[wrap].setdefault(package, []).append(statistics.median(lasted))
    return [row_of(schedule, wrap, quiet, seconds[wrap]) for wrap in titan.WRAPS]


def row_of(schedule: str, wrap: str, quiet: bool, seconds: dict[str, list[float]]) -> dict:
    """``seconds``: by package, of each round."""
    row = {
        "schedule": schedule,
        "wrap": wrap,
        "quiet": quiet,
        "step_ms": {package: spread([s * 1e3 for s in found]) for package, found in seconds.items()},
    }
    if titan.TORCH in seconds:
        faster = [theirs / ours for ours, theirs in zip(seconds[titan.OURS], seconds[titan.TORCH])]
        row["faster_than_torch"] = spread(faster)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="of a round")
    parser.add_argument("--schedules", nargs="+", default=list(titan.SCHEDULES), choices=titan.SCHEDULES)
    options = parser.parse_args()
    one_thread_a_process()
    rows = []
    for row in itertools.chain.from_iterable(
        measure(name, options.rounds, options.steps) for name in options.schedules
    ):
        rows.append(row)
        print(f"{row['schedule']}, {row['wrap']}")
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
