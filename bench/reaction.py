"""What reaction saves where the times of tasks vary: mean simulated makespan, static and reactive.

Both run the same random times, with a coefficient of variation of 0.3. Writes bench/results/reaction.json.
"""

import argparse
import json
import statistics
from pathlib import Path

from environment import describe

import pipeline_ext as pe
from pipeline_ext import _C

RESULTS = Path(__file__).parent / "results" / "reaction.json"
NOISE = 0.3
RANKS = (4, 8, 32)
CASES = [  # schedule, times the slots it plans
    ("gpipe", 1),
    ("1f1b", 1),
    ("1f1b", 2),
    ("interleaved-1f1b", 1),
    ("zb-h1", 1),
    ("zb-h1", 2),
    ("zb-h2", 1),
    ("zbv", 1),
    ("v-half", 1),
]


def compare(schedule: str, slots: int, ranks: int, seeds: int) -> dict:
    """One case: F = I = W = 1 on each rank, no latency, four microbatches for each rank."""
    chunks = 2 if _C.layout_of(schedule) in ("looped", "v") else 1
    size = {"num_stages": ranks * chunks, "num_ranks": ranks, "microbatches": 4 * ranks}
    costs = pe.Costs(forward=1 / chunks, backward=2 / chunks)
    static = pe.build_plan(schedule, **size)
    room = [min(slots * limit, 4 * ranks) for limit in static.limits] if slots > 1 else ()
    reactive = pe.build_plan(schedule, **size, reactive=True, room=room)
    pairs = [
        tuple(pe.simulate(plan, costs, noise=NOISE, seed=seed).makespan for plan in (static, reactive))
        for seed in range(seeds)
    ]
    ratios = [ours / planned for planned, ours in pairs]
    return {
        "schedule": schedule,
        "ranks": ranks,
        "slots": slots,
        "without_noise": pe.simulate(static, costs).makespan,
        "static": statistics.mean(planned for planned, _ in pairs),
        "reactive": statistics.mean(ours for _, ours in pairs),
        "ratio": statistics.mean(ratios),
        "ratio_standard_error": statistics.stdev(ratios) / len(ratios) ** 0.5,
        "seeds": seeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    options = parser.parse_args()
    rows = []
    print(
        f"{'schedule':18} {'slots':>5} {'ranks':>5} {'no noise':>9} {'static':>9} {'reactive':>9} {'ratio':>7}"
    )
    for schedule, slots in CASES:
        for ranks in RANKS:
            row = compare(schedule, slots, ranks, options.seeds)
            rows.append(row)
            print(
                f"{schedule:18} {slots:5} {ranks:5} {row['without_noise']:9.1f} {row['static']:9.1f} "
                f"{row['reactive']:9.1f} {row['ratio']:7.3f}"
            )
    RESULTS.parent.mkdir(exist_ok=True)
    results = {"environment": describe(), "noise": NOISE, "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
