"""The host's time on a GPU: of a step in graph mode by the graph's nodes, and of an action in eager mode.

Graph mode: steps of small GPTs, each begun with nothing in flight, timed until ``step`` returns. Eager mode:
stages that do next to nothing, as bench/dispatch.py has them on the CPU, beside the same calls alone, plain
accumulation, and torch.distributed.pipelining with all stages on one rank. Writes
bench/results/DEVICE/gpu_host.json.
"""

import statistics
import tempfile
import time

import torch
from dispatch import IN_TURN, MICROBATCHES, accumulation, eager, idle, ours, theirs
from environment import write_results
from gpu_contenders import GRAPHS, OVERLAP, Size, contenders, device_here, wants_smoke
from side_by_side import A_MOMENT, Contender, one_thread_a_process, running, spread, wait_until_quiet
from tables import gpu_host as table

AIM = 50  # microseconds, of the step of 4 stages with 16 microbatches
GPTS = [  # stages, and the model
    (stages, Size(f"{layers} layers", 512, layers, rows=1, context=256, microbatches=microbatches))
    for stages, layers, microbatches in ((2, 2, 4), (2, 4, 8), (4, 4, 16), (4, 8, 16), (4, 8, 32), (4, 16, 32))
]
SMOKE = [(2, Size("smoke", 16, 2, rows=1, context=8, microbatches=2))]


def graph_mode(size: Size, stages: int, device: str, steps: int) -> dict:
    """One row: the nodes of the step's graph, and the host's microseconds of each step."""
    trainer = contenders(size, stages, device)[GRAPHS if device != "cpu" else OVERLAP]()
    trainer.warm_up()
    wait, taken = idle(device), []
    for _ in range(steps):
        trainer.zero_grad()
        wait()
        begin = time.perf_counter()
        trainer.step()
        taken.append((time.perf_counter() - begin) * 1e6)
    wait()
    graph = trainer.pipe.graph if device != "cpu" else None
    trainer.pipe.close()
    return {
        "stages": stages,
        "layers": size.layers,
        "microbatches": size.microbatches,
        "nodes": graph.nodes if graph else 0,
        "fallback": graph.fallback if graph else "the CPU has no graphs",
        "host_us": spread(taken),
        "aim_us": AIM if (stages, size.microbatches) == (4, 16) else None,
    }


def eager_mode(device: str, rounds: int, steps: int) -> dict:
    """The eager calls alone, and of each contender the step and what an action takes beyond those."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Contender("eager", eager, device)
        others = [
            Contender("plain accumulation", accumulation, device),
            Contender("pipeline_ext, one rank, one stream", ours, 1, False, device),
            Contender("pipeline_ext, one rank, two streams", ours, 1, True, device),
            Contender("pipeline_ext, two ranks", ours, 2, True, device),
            Contender("torch, both stages on one rank", theirs, 1, f"{folder}/1", device),
        ]
        times: list[list[float]] = [[] for _ in (plain, *others)]
        with running([plain, *others]):
            for _ in range(rounds):
                for contender, medians in zip((plain, *others), times):
                    medians.append(statistics.median(contender.run(steps)[0]))
    alone, actions = times[0], MICROBATCHES * len(IN_TURN)
    return {
        "actions": actions,
        "eager_step_us": spread(alone),
        "rows": [
            {
                "contender": contender.name,
                "step_us": spread(taken),
                "overhead_us": spread([(a - b) / actions for a, b in zip(taken, alone)]),
            }
            for contender, taken in zip(others, times[1:])
        ],
    }


def show(graphs: list[dict], eager: dict) -> None:
    """Measured times beside the aim and the peer."""
    for row in graphs:
        aim = "" if row["aim_us"] is None else f"  aim: under {row['aim_us']} us"
        figures = "{min:8.1f} {median:8.1f} {max:8.1f} us".format(**row["host_us"])
        print(
            f"{row['stages']} stages, {row['layers']:2} layers, {row['microbatches']:2} microbatches: "
            f"{row['nodes']:6} nodes, host {figures}{aim}"
        )
        if row["fallback"]:
            print(f"  not a graph: {row['fallback']}")
    for row in eager["rows"]:
        figures = "{min:6.1f} {median:6.1f} {max:6.1f} us".format(**row["overhead_us"])
        print(f"{row['contender']:36} an action above the eager compute {figures}")


def main() -> None:
    smoke = wants_smoke(__doc__)
    torch.set_num_threads(1)
    one_thread_a_process()
    device, gpts, steps = (device_here(), SMOKE, 1) if smoke else ("cuda:0", GPTS, 100)
    quiet = smoke or wait_until_quiet(A_MOMENT)
    eager = eager_mode(device, rounds=1 if smoke else 7, steps=1 if smoke else 20)
    graphs = []
    for stages, size in gpts:
        graphs.append(graph_mode(size, stages, device, steps))
        if not smoke:
            write_results("gpu_host", "cuda", quiet=quiet, graphs=graphs, eager=eager)
    show(graphs, eager)
    if smoke:
        print("\n".join(table({"graphs": graphs, "eager": eager})))


if __name__ == "__main__":
    main()
