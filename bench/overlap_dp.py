"""What replicas' gradients cost a step of two stages in two replicas: four gloo processes of one thread each.

The gradients are reduced while the step runs, after it, or not at all, by Pipeline and by
torch.distributed.pipelining with stages in DistributedDataParallel; all take turns. Of what the reduction takes
after the step, the share is hidden that it does not take during the step; Pipeline's own traces tell it, too,
without the noise of a difference. The compute of "waits" is a wait, as
of devices that leave the host alone; that of "perceptron" needs the two cores that the reduction needs, too.
Writes bench/results/overlap_dp.json.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import write_results
from models import loss_fn
from side_by_side import Contender, Run, Span, in_turn, one_thread_a_process, spread
from steps import promised, timed
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

    grads = [p.grad for module in modules for p in module.parameters()]
    works = [(dist.all_reduce(grad, group=group, async_op=True), grad) for grad in grads]
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

    def measured() -> tuple[list[float], list[float], Reduced | None]:
        profile = pipe.profile()
        return profile.forward, profile.backward, Reduced.of(pipe.trace) if way == "during" else None

    return timed(step, model, dist.barrier, measured)


class Reduced(NamedTuple):
    """What a process did in a step; seconds of the machine's clock."""

    computed: float  # until when
    buffers: list[tuple[float, float]]  # as they left: when each was handed over, and when it was back

    @classmethod
    def of(cls, trace: Any) -> "Reduced":
        zero = trace.record.begin * 1e-9
        return cls(
            zero + max(task.end for task in trace.tasks),
            [(zero + record.begin, zero + record.end) for record in trace.reductions],
        )


def hidden(replicas: Sequence[Reduced]) -> float:
    """Share of the time in which replicas of a rank reduce that lies before the last of them has computed.

    A buffer is reduced from when all of them have handed it over: before that one waits for another.
    """
    covered = reducing = late = 0.0
    computed = max(replica.computed for replica in replicas)
    for times in zip(*(replica.buffers for replica in replicas)):
        begins, ends = zip(*times)
        begin, end = max(covered, *begins), max(ends)
        reducing += max(0.0, end - begin)
        late += max(0.0, end - max(begin, computed))
        covered = max(covered, end)
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


def figure(schedule: str, key: tuple[str, str], ranks: Sequence[Span], took: float) -> float | None:
    """Of Pipeline: the seconds promised where nothing is reduced; the share hidden, by traces, where it is."""
    measured = [found for _, _, found in ranks]
    if key == ("Pipeline", "none"):
        return promised(schedule, MICROBATCHES, [found[:2] for found in measured[:2]])  # of the first replica
    if key == ("Pipeline", "during"):
        reduced = [found[2] for found in measured]
        return min(hidden(reduced[rank::2]) for rank in range(2))  # where least is hidden
    return None


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
        turns = in_turn(contenders, rounds, 3, functools.partial(figure, schedule))
    rows = []
    for engine in makes:
        during, after, none = (turns.seconds[engine, way] for way in WAYS)
        # One round's difference is as small as its noise: of the medians.
        whole = statistics.median(after) - statistics.median(none)
        row = {
            "case": case,
            "schedule": schedule,
            "engine": engine,
            "quiet": turns.quiet,
            **{f"{way}_ms": spread([t * 1e3 for t in turns.seconds[engine, way]]) for way in WAYS},
            "reduction_ms": whole * 1e3,
            "hidden": (statistics.median(after) - statistics.median(during)) / whole,
        }
        if engine == "Pipeline":
            row["hidden_by_trace"] = spread(turns.figures["Pipeline", "during"])
            row["promised_ms"] = spread([t * 1e3 for t in turns.figures["Pipeline", "none"]])
            row["faster_than_torch"] = spread([a / b for a, b in zip(turns.seconds["torch", "during"], during)])
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
