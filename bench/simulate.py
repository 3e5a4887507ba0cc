"""Speed and memory of planning and simulating, how they scale, and torch's generation and lowering beside them.

Links (latency, overhead, bandwidth) and the memory model are on. Each size runs in a process of its own;
contenders take turns in one. Writes bench/results/simulate.json.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from environment import describe

import pipeline_ext as pe
from pipeline_ext import _C

RESULTS = Path(__file__).parent / "results" / "simulate.json"
CASES = [  # schedule, ranks, microbatches, reactive
    ("zbv", 8, 210, False),
    ("zbv", 64, 260, False),
    ("zbv", 256, 652, False),
    ("zbv", 512, 3_256, False),
    ("zbv", 1_024, 4_096, False),
    ("1f1b", 8, 640, False),
    ("1f1b", 8, 640, True),
    ("1f1b", 64, 8_000, False),
    ("1f1b", 64, 8_000, True),
    ("interleaved-1f1b", 512, 4_096, False),
]
PEER_CASES = [("zbv", 4, 16), ("zbv", 8, 64), ("zbv", 16, 128), ("zbv", 32, 128)]  # ranks, microbatches


def build(schedule: str, ranks: int, microbatches: int, reactive: bool = False) -> pe.Plan:
    """The plan of a case, with two stages on a rank where the schedule has several."""
    chunks = 2 if _C.layout_of(schedule) in ("looped", "v") else 1
    return pe.build_plan(
        schedule,
        num_stages=ranks * chunks,
        num_ranks=ranks,
        microbatches=microbatches,
        reactive=reactive,
    )


def costs_of(plan: pe.Plan) -> pe.Costs:
    """Times of which a rank's F, I and W are 1 each, links and memory."""
    chunks = plan.num_stages // plan.num_ranks
    return pe.Costs(
        forward=1.0 / chunks,
        backward=2.0 / chunks,
        latency=0.01,
        overhead=0.001,
        bandwidth=1e9,
        message_bytes=1e6,
        act_memory=1.0,
        mem_i=0.4,
        memory_limit=float(4 * plan.num_stages + plan.num_microbatches),
    )


def spread(values: list[float]) -> dict[str, float]:
    """What is written of repeated measurements."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def measure(case: tuple, repeats: int, connection) -> None:
    """Sends what one case came to; its first planning and simulation also in a fresh process's memory."""
    schedule, ranks, microbatches, reactive = case
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned, simulated = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        plan = build(*case)
        middle = time.perf_counter()
        simulation = pe.simulate(plan, costs_of(plan))
        simulated.append(time.perf_counter() - middle)
        planned.append(middle - begin)
        if len(planned) == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tasks = len(plan)
        nbytes = plan.nbytes, simulation.working_bytes
        del plan, simulation
    connection.send(
        {
            "schedule": schedule,
            "reactive": reactive,
            "ranks": ranks,
            "microbatches": microbatches,
            "tasks": tasks,
            "plan_seconds": spread(planned),
            "simulate_seconds": spread(simulated),
            "nanoseconds_per_task": spread([1e9 * (p + s) / tasks for p, s in zip(planned, simulated)]),
            "peak_rss_gib": peak / 2**20,
            "rss_before_gib": before / 2**20,
            "plan_bytes_per_task": nbytes[0] / tasks,
            "simulation_bytes_per_task": nbytes[1] / tasks,
        }
    )


def torch_zbv(ranks: int, microbatches: int) -> Callable[[], tuple[float, float]]:
    """A call that lets torch generate ZBV, lower it to sends and receives and simulate that; in seconds, with
    and without the simulation."""
    from torch.distributed.pipelining import schedules
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    class Bare(schedules.ScheduleZBVZeroBubble):
        def __init__(self) -> None:
            self.pp_group_size, self._n_microbatches = ranks, microbatches
            self._num_stages = self.num_stages = 2 * ranks

    homes = generate_stage_to_rank_mapping(ranks, 2 * ranks, style="v")

    def run() -> tuple[float, float]:
        begin = time.perf_counter()
        schedule = Bare()
        order = {rank: schedule._calculate_single_rank_operations(rank) for rank in range(ranks)}
        lowered = schedules._add_send_recv(
            {
                rank: schedules._add_reduce_grad(schedules._add_unshard_reshard(row), microbatches)
                for rank, row in order.items()
            },
            stage_to_rank=lambda s: homes[s],
            num_stages=2 * ranks,
        )
        generated = time.perf_counter() - begin
        lowered = {
            rank: [a for a in row if a.computation_type.name not in ("UNSHARD", "RESHARD", "REDUCE_GRAD")]
            for rank, row in lowered.items()
        }
        begin = time.perf_counter()
        schedules._simulate_comms_compute(lowered, lambda s: homes[s], 2 * ranks)
        return generated, generated + time.perf_counter() - begin

    return run


def measure_peer(case: tuple, repeats: int, connection) -> None:
    """Sends how ours and torch's compare; they take turns, and a ratio is of one turn."""
    schedule, ranks, microbatches = case
    peer = torch_zbv(ranks, microbatches)
    plans, both = [], []
    for _ in range(repeats):
        begin = time.perf_counter()
        plan = build(schedule, ranks, microbatches)
        planned = time.perf_counter() - begin
        pe.simulate(plan, costs_of(plan))
        simulated = time.perf_counter() - begin
        generated, all_of_it = peer()
        plans.append((generated, planned))
        both.append((all_of_it, simulated))
    connection.send(
        {
            "schedule": schedule,
            "ranks": ranks,
            "microbatches": microbatches,
            "tasks": len(plan),
            "torch_plan_seconds": spread([t for t, _ in plans]),
            "torch_seconds": spread([t for t, _ in both]),
            "seconds": spread([s for _, s in both]),
            "plan_faster_by": spread([t / s for t, s in plans]),
            "faster_by": spread([t / s for t, s in both]),
        }
    )


def in_a_process(target: Callable, *args: object) -> dict:
    """What ``target`` sends from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*args, theirs))
    process.start()
    row = ours.recv()
    process.join()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    rows, peers = [], []
    for case in CASES:
        row = in_a_process(measure, case, options.repeats)
        rows.append(row)
        name = row["schedule"] + (", reactive" if row["reactive"] else "")
        print(
            f"{name:18} {row['ranks']:5} ranks {row['tasks']:11,} tasks: planned and simulated in "
            f"{row['plan_seconds']['median']:.3f} s and {row['simulate_seconds']['median']:.3f} s, "
            f"{row['nanoseconds_per_task']['median']:.0f} ns a task, {row['peak_rss_gib']:.2f} GiB"
        )
    for case in PEER_CASES:
        row = in_a_process(measure_peer, case, options.repeats)
        peers.append(row)
        print(
            f"{row['schedule']} {row['ranks']:3} ranks, {row['tasks']:,} tasks: torch plans and simulates in "
            f"{row['torch_seconds']['median']:.3f} s, ours is faster by {row['faster_by']['median']:.0f}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    results = {"environment": describe(), "rows": rows, "peers": peers}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
