"""What replicas' gradients cost a step of two stages in two replicas: four gloo processes of one thread each.

The gradients are reduced while the step runs, after it, or not at all, by Pipeline and by
torch.distributed.pipelining with stages in DistributedDataParallel; all take turns. Of what the reduction takes
after the step, the share is hidden that it does not take during the step; Pipeline's own traces tell it, too,
without the noise of a difference. The compute of "waits" is a wait, as
of devices that leave the host alone; that of "perceptron" needs the two cores that the reduction needs, too.
Writes bench/results/overlap_dp.json.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cpu_step import timed
from environment import write_results
from models import loss_fn
from side_by_side import Contender, Run, one_thread_a_process, running, spread, wait_until_quiet
from torch import Tensor, nn

MICROBATCHES = 8
LAYERS = 16
WIDTH = 1024
BUCKET = 2**22  # bytes, of both: a layer's weight
SCHEDULES = {"1f1b": ("1F1B", 2), "interleaved-1f1b": ("Interleaved1F1B", 4)}  # and the stages it takes
WAYS = ("during", "after", "none")


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        time.sleep(0.003)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        time.sleep(0.006)
        return grad


class Wait(nn.Module):
    """A layer on a device, as far as the host can see."""

    def forward(self, x: Tensor) -> Tensor:
        return _Wait.apply(x)


CASES = {"waits": (Wait, 1), "perceptron": (nn.GELU, 32)}  # what follows each weight; rows of a microbatch


def _data(case: str) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    follows, rows = CASES[case]
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), follows()) for _ in range(LAYERS)))
    return model, torch.randn(rows * MICROBATCHES, WIDTH), torch.randn(rows * MICROBATCHES, WIDTH)


def _mesh(store: str, rank: int) -> "torch.distributed.DeviceMesh":
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4)
    return dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))


def _reduce(modules: list[nn.Module], group: "torch.distributed.ProcessGroup") -> None:
    """All gradients at once, in buffers of about ``BUCKET`` bytes."""
    import torch.distributed as dist

    works = []
    for module in modules:
        for p in module.parameters():
            works.append((dist.all_reduce(p.grad, group=group, async_op=True), p.grad))
    for work, grad in works:
        work.wait()
        grad.div_(dist.get_world_size(group))


def ours(case: str, schedule: str, way: str, store: str, rank: int) -> Run:
    import torch.distributed as dist

    import pipeline_ext as pe

    mesh, (model, x, y) = _mesh(store, rank), _data(case)
    reduction = pe.GradientReduction(pe.ProcessGroupMember(mesh.get_group("dp")), bucket_bytes=BUCKET)
    pipe = pe.Pipeline(
        model,
        SCHEDULES[schedule][1],
        MICROBATCHES,
        schedule,
        loss_fn,
        mesh=mesh,
        reduction=reduction,
    )

    def step() -> None:
        if way == "during":
            pipe.step(x, target=y)
            return
        with pipe.no_sync():
            pipe.step(x, target=y)
        if way == "after":
            _reduce(pipe.stage_modules, mesh.get_group("dp"))

    def measured() -> tuple[list[float], list[float], float | None]:
        profile = pipe.profile()
        return profile.forward, profile.backward, _hidden(pipe.trace) if way == "during" else None

    return timed(step, model, dist.barrier, measured)


def _hidden(trace: Any) -> float:
    """Share of the time in which this process reduced that lies before its last task's end."""
    end, covered, reducing, late = max(task.end for task in trace.tasks), 0.0, 0.0, 0.0
    for record in trace.reductions:
        begin = max(record.begin, covered)
        reducing += max(0.0, record.end - begin)
        late += max(0.0, record.end - max(begin, end))
        covered = max(covered, record.end)
    return 1.0 - late / reducing


def theirs(case: str, schedule: str, way: str, store: str, rank: int) -> Run:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class
    from torch.nn.parallel import DistributedDataParallel

    mesh, (model, x, y) = _mesh(store, rank), _data(case)
    name, count = SCHEDULES[schedule]
    place, each = mesh.get_local_rank("pp"), LAYERS // count
    modules: list[nn.Module] = [model[i * each : (i + 1) * each] for i in range(place, count, 2)]
    if way == "during":
        modules = [
            DistributedDataParallel(m, process_group=mesh.get_group("dp"), bucket_cap_mb=BUCKET / 2**20)
            for m in modules
        ]
    stages = [
        PipelineStage(module, place + 2 * i, count, torch.device("cpu"), group=mesh.get_group("pp"))
        for i, module in enumerate(modules)
    ]
    runner = get_schedule_class(name)(stages[0] if count == 2 else stages, MICROBATCHES, loss_fn=loss_fn)

    def step() -> None:
        if place == 0:
            runner.step(x, return_outputs=False)
        else:
            runner.step(target=y, losses=[], return_outputs=False)
        if way == "after":
            _reduce(modules, mesh.get_group("dp"))

    return timed(step, model, dist.barrier)


def promised(schedule: str, of_ranks: list) -> float:
    """Seconds of a step that reduces nothing, by the times that the first replica measured of its stages."""
    import pipeline_ext as pe

    forward, backward = ([max(times) for times in zip(*of_kind)] for of_kind in zip(*of_ranks))
    plan = pe.build_plan(
        schedule, num_stages=len(forward), microbatches=MICROBATCHES, num_ranks=2, reactive=True
    )
    return pe.simulate(plan, pe.Costs(forward=forward, backward=backward)).makespan


def measure(case: str, schedule: str, rounds: int) -> list[dict]:
    """A row for each engine."""
    makes = {"Pipeline": ours, "torch": theirs}
    with tempfile.TemporaryDirectory() as folder:
        contenders = {
            (engine, way): Contender(
                engine, make, case, schedule, way, str(Path(folder) / f"{engine} {way}"), ranks=4
            )
            for engine, make in makes.items()
            for way in WAYS
        }
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in contenders}
        promises: list[float] = []
        hidden: list[float] = []  # in the process that hides least
        with running(list(contenders.values())):
            quiet = wait_until_quiet()
            for _ in range(rounds):
                for key, contender in contenders.items():
                    spans = list(zip(*contender.run(3)))
                    lasted = [max(s[1] for s in ranks) - min(s[0] for s in ranks) for ranks in spans]
                    seconds[key].append(statistics.median(lasted))
                    if key == ("Pipeline", "none"):
                        promises.append(
                            statistics.median(
                                promised(schedule, [s[2][:2] for s in ranks[:2]]) for ranks in spans
                            )
                        )
                    if key == ("Pipeline", "during"):
                        hidden.append(statistics.median(min(s[2][2] for s in ranks) for ranks in spans))
    rows = []
    for engine in makes:
        during, after, none = (seconds[engine, way] for way in WAYS)
        # One round's difference is as small as its noise: of the medians.
        whole = statistics.median(after) - statistics.median(none)
        row = {
            "case": case,
            "schedule": schedule,
            "engine": engine,
            "quiet": quiet,
            **{f"{way}_ms": spread([t * 1e3 for t in seconds[engine, way]]) for way in WAYS},
            "reduction_ms": whole * 1e3,
            "hidden": (statistics.median(after) - statistics.median(during)) / whole,
        }
        if engine == "Pipeline":
            row["hidden_by_trace"] = spread(hidden)
            row["promised_ms"] = spread([t * 1e3 for t in promises])
            row["faster_than_torch"] = spread([a / b for a, b in zip(seconds["torch", "during"], during)])
        rows.append(row)
    return rows


def show(row: dict) -> None:
    """One line."""
    times = "  ".join(f"{way} {row[f'{way}_ms']['median']:7.1f}" for way in WAYS)
    promise = ""
    if "promised_ms" in row:
        promise = f"  promised without {row['promised_ms']['median']:.1f}"
        promise += "  hidden by the trace {min:.2f} {median:.2f} {max:.2f}".format(**row["hidden_by_trace"])
    place = f"{row['case']:10} {row['schedule']:17} {row['engine']:9}"
    print(f"{place} ms: {times}{promise}  hidden {row['hidden']:.0%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    one_thread_a_process()
    rows = []
    for case in options.cases:
        for schedule in SCHEDULES:
            for row in measure(case, schedule, options.rounds):
                rows.append(row)
                show(row)
    write_results("overlap_dp", microbatches=MICROBATCHES, rows=rows)


if __name__ == "__main__":
    main()
