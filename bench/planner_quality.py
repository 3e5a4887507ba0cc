"""Schedules, and orders that the planner finds, beside what is published and what no order can beat.

Every row of tests/tables, at its own costs and memory, with the bubble counted as the publication does.
Writes bench/results/planner_quality.json.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from environment import describe

import pipeline_ext as pe
from pipeline_ext import _C
from pipeline_ext.plan.zero_bubble import NAME

TABLES = Path(__file__).parent.parent / "tests" / "tables"
RESULTS = Path(__file__).parent / "results" / "planner_quality.json"
SHAPES = {"1.5B": (2304, 24, 1024), "6.2B": (4096, 32, 1024)}  # hidden, heads, sequence


def rows(table: str) -> list[dict[str, str]]:
    with (TABLES / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def costs_of(
    f: float, i: float, w: float, latency: float, chunks: int, shape: tuple[int, int, int], limit: float | None
) -> pe.Costs:
    """With the times of one rank's share; ``limit`` in forwards' activations of a whole rank."""
    hidden, heads, sequence = shape
    taken = 34 * hidden + 5 * heads * sequence
    return pe.Costs(
        forward=f / chunks,
        backward=(i + w) / chunks,
        input_grad=i / chunks,
        weight_grad=w / chunks,
        latency=latency,
        act_memory=taken / chunks,
        mem_w=32 * hidden / chunks,
        memory_limit=None if limit is None else limit * taken,
    )


def zero_bubble_rows() -> Iterator[dict]:
    columns = {
        "zb_iclr24_table5_6": ("T_F_ms", "T_B_ms", "T_W_ms", "T_comm_ms"),
        "zb_arxiv_zbv_bubbles": ("F_us_stage", "B_us_stage", "W_us_stage", "comm_us"),
    }
    for table, names in columns.items():
        for row in rows(table):
            times = [float(row[name]) for name in names]
            shape = (int(row["hidden"]), int(row["heads"]), int(row["seq"]))
            ranks, chunks = int(row["p"]), int(row["vpp_chunks"])
            for method, schedule, stages, limit, span in (
                ("1F1B", "1f1b", 1, None, False),
                ("1F1B-I_all_wraparound_edges", "interleaved-1f1b", chunks, None, False),
                ("ZB-H1", "zb-h1", 1, None, False),
                ("ZB-H2", "zb-h2", 1, None, True),
                ("ZB-1p", NAME, 1, ranks, True),
                ("ZB-2p", NAME, 1, 2 * ranks, True),
                ("ZB-V", NAME, 2, ranks, True),
            ):
                if row.get(f"bubble_{method}"):
                    costs = costs_of(*times, stages, shape, limit)
                    yield {
                        "case": f"{row['model']}, {ranks} ranks, {row['m']} microbatches",
                        "method": method.partition("_")[0],
                        "published": float(row[f"bubble_{method}"]),
                        **measure(schedule, ranks, stages, int(row["m"]), costs, span),
                    }


def memory_rows() -> Iterator[dict]:
    for row in rows("zb_memory_limit_curve"):
        ranks, m, share = int(row["p"]), int(row["m"]), float(row["mem_limit_in_p_times_M_F"])
        times = [float(row[name]) for name in ("F_us", "B_us", "W_us", "comm_us")]
        for method, chunks, column in (("ZB", 1, "bubble_ZB_auto"), ("ZB-V", 2, "bubble_ZB-V")):
            costs = costs_of(*times, chunks, SHAPES[row["model"]], share * ranks)
            yield {
                "case": f"{row['model']}, {ranks} ranks, {m} microbatches",
                "method": f"{method}, memory of {share * ranks:g}",
                "published": float(row[column]),
                **measure(NAME, ranks, chunks, m, costs, True),
            }


def v_rows() -> Iterator[dict]:
    for row in rows("v_schedule_reference"):
        ranks, m = int(row["p"]), int(row["m"])
        f, i, w, latency = (float(row[name]) for name in ("F", "B", "W", "comm"))
        costs = pe.Costs(forward=f, backward=i + w, input_grad=i, weight_grad=w, latency=latency)
        yield {
            "case": f"F {f:g}, I {i:g}, W {w:g}, latency {latency:g}, {ranks} ranks, {m} microbatches",
            "method": row["schedule"],
            "published": float(row["bubble"]),
            **measure(row["schedule"].lower(), ranks, 2, m, costs, False),
        }


def dual_rows() -> Iterator[dict]:
    for row in rows("dualpipe_reference"):
        ranks, m = int(row["ranks"]), int(row["microbatches"])
        f, i, w, both = (float(row[name]) for name in ("F", "B", "W", "FB"))
        schedule, pair = row["schedule"].lower(), both / (f + i + w)
        costs = pe.Costs(forward=f, backward=i + w, input_grad=i, weight_grad=w, pair=pair)
        chunks = 1 if schedule == "dualpipe" else 2
        plan = pe.build_plan(schedule, num_stages=ranks * chunks, num_ranks=ranks, microbatches=m)
        yield {
            "case": f"F {f:g}, I {i:g}, W {w:g}, pair {both:g}, {ranks} ranks, {m} microbatches",
            "method": row["schedule"],
            "published": float(row["makespan"]),
            "ours": pe.simulate(plan, costs).makespan,
            "lower_bound": None,
        }


def measure(schedule: str, ranks: int, chunks: int, microbatches: int, costs: pe.Costs, span: bool) -> dict:
    """The bubble, of the longest span or of the makespan, and the least that it can be on these ranks."""
    stages = ranks * chunks
    plan = pe.build_plan(schedule, num_stages=stages, num_ranks=ranks, microbatches=microbatches, costs=costs)
    simulation = pe.simulate(plan, costs)
    bound = _C.lower_bound(plan.rank_of_stage, ranks, microbatches, costs.by_stage(stages, ranks))[int(span)]
    work = microbatches * chunks * (costs.forward + costs.backward)
    return {
        "ours": simulation.bubble_from_first_start if span else simulation.bubble_latest,
        "lower_bound": max(0.0, 1.0 - work / bound),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.parse_args()
    found = []
    for part in (zero_bubble_rows, memory_rows, v_rows, dual_rows):
        for row in part():
            found.append(row)
            bound = "" if row["lower_bound"] is None else f"{row['lower_bound']:10.6f}"
            figures = f"{row['published']:10.6f} {row['ours']:10.6f} {bound}"
            print(f"{row['case']:60} {row['method']:24} {figures}", flush=True)
    RESULTS.write_text(json.dumps({"environment": describe(), "rows": found}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
