"""Speed and memory of the simulator: tasks per second, and bytes a task beyond the plan itself.

Each size runs in a process of its own. Writes bench/results/simulate.json.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

from environment import describe

import pipeline_ext as pe

RESULTS = Path(__file__).parent / "results" / "simulate.json"
CASES = [  # name, schedule, ranks, chunks, microbatches, reactive
    ("1f1b", "1f1b", 8, 1, 640, False),
    ("1f1b, reactive", "1f1b", 8, 1, 640, True),
    ("1f1b", "1f1b", 64, 1, 8_000, False),
    ("1f1b, reactive", "1f1b", 64, 1, 8_000, True),
    ("interleaved-1f1b", "interleaved-1f1b", 64, 2, 4_000, False),
    ("interleaved-1f1b, reactive", "interleaved-1f1b", 64, 2, 4_000, True),
    ("interleaved-1f1b", "interleaved-1f1b", 512, 2, 4_096, False),
]


def measure(case: tuple, repeats: int, connection) -> None:
    """Sends what one case came to."""
    name, schedule, ranks, chunks, microbatches, reactive = case
    begin = time.perf_counter()
    plan = pe.build_plan(
        schedule,
        num_stages=ranks * chunks,
        num_ranks=ranks,
        microbatches=microbatches,
        reactive=reactive,
    )
    planned = time.perf_counter() - begin
    costs = pe.Costs(forward=1.0 / chunks, backward=2.0 / chunks, latency=0.01)
    pe.simulate(plan, costs)  # touches the memory that later runs reuse
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        pe.simulate(plan, costs)
        seconds.append(time.perf_counter() - begin)
    rates = [len(plan) / s / 1e6 for s in seconds]
    connection.send(
        {
            "case": name,
            "ranks": ranks,
            "stages": ranks * chunks,
            "microbatches": microbatches,
            "tasks": len(plan),
            "plan_seconds": planned,
            "million_tasks_per_second": {
                "min": min(rates),
                "median": statistics.median(rates),
                "max": max(rates),
            },
            "plan_bytes_per_task": plan.nbytes / len(plan),
            "simulation_bytes_per_task": pe.simulate(plan, costs).working_bytes / len(plan),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows = []
    context = multiprocessing.get_context("spawn")
    print(
        f"{'case':28} {'ranks':>6} {'tasks':>10} {'M tasks/s (min median max)':>28} "
        f"{'bytes/task: plan':>17} {'simulation':>11}"
    )
    for case in CASES:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(case, options.repeats, theirs))
        process.start()
        row = ours.recv()
        process.join()
        rows.append(row)
        rate = row["million_tasks_per_second"]
        print(
            f"{row['case']:28} {row['ranks']:6} {row['tasks']:10,} "
            f"{rate['min']:10.1f} {rate['median']:8.1f} {rate['max']:8.1f} "
            f"{row['plan_bytes_per_task']:17.1f} {row['simulation_bytes_per_task']:11.1f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"environment": describe(), "rows": rows}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
