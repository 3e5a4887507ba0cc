"""The drop-in for torch.distributed.pipelining with a process for each rank."""

import multiprocessing
import queue
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

import pipeline_ext as pe

pytest.importorskip("torch.distributed.pipelining")

SOON = 60.0  # seconds, far above what a job takes
CPU = torch.device("cpu")
WIDTH = 8
SINGLE = ["GPipe", "1F1B"]
V_SHAPED = ["ZBVZeroBubble", "DualPipeV"]
MULTI = ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", *V_SHAPED]


def _serve(job, rank, size, store, answers, *args):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        answers.put((rank, job(rank, size, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        answers.put((rank, traceback.format_exc()))


def run(job, size, store, *args):
    """What ``job(rank, size, *args)`` returns in each of ``size`` processes, or its error as text; by rank."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    processes = [
        context.Process(target=_serve, args=(job, rank, size, str(store), answers, *args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(answers.get(timeout=SOON) for _ in processes)
    except queue.Empty:
        pytest.fail("a process stands still")
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    return [found[rank] for rank in range(size)]


def layer(index):
    generator = torch.Generator().manual_seed(index)
    made = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made


def batch(rows, seed=0):
    x, y = torch.randn(2, rows, WIDTH, generator=torch.Generator().manual_seed(99 + seed))
    return x, y


def local_stages(name, rank, ranks):
    """Which stages a rank holds, and how many there are."""
    if name in SINGLE:
        return [rank], ranks
    return [rank, 2 * ranks - 1 - rank if name in V_SHAPED else rank + ranks], 2 * ranks


def make(name, microbatches, group=None, wrap=lambda module: module, loss_fn=mse_loss):
    """This process's schedule, and its stages' modules by index."""
    from pipeline_ext import pipelining

    here, count = local_stages(name, dist.get_rank(group), dist.get_world_size(group))
    modules = {s: layer(s) for s in here}
    stages = [pipelining.PipelineStage(wrap(m), s, count, CPU, group=group) for s, m in modules.items()]
    schedule = pipelining.schedules.get_schedule_class(name)
    return schedule(stages[0] if name in SINGLE else stages, microbatches, loss_fn=loss_fn), modules, count


def step(schedule, modules, count, x, y):
    losses = []
    target = y if count - 1 in modules else None
    out = schedule.step(*([x] if 0 in modules else []), target=target, losses=losses)
    return out, losses


def grads(modules):
    return {s: [p.grad for p in m.parameters()] for s, m in modules.items()}


def reference(count, *batches):
    model = nn.Sequential(*(layer(s) for s in range(count)))
    for x, y in batches:
        mse_loss(model(x), y).backward()
    return {s: [p.grad for p in m.parameters()] for s, m in enumerate(model)}, model


def train(rank, size, name, rows, microbatches):
    schedule, modules, count = make(name, microbatches)
    x, y = batch(rows)
    out, losses = step(schedule, modules, count, x, y)
    step(schedule, modules, count, x[: len(x) // 2 + 4], y[: len(x) // 2 + 4])  # of another size
    evaluated = schedule.eval(*([x] if 0 in modules else []))
    expected, model = reference(count, (x, y), (x[: len(x) // 2 + 4], y[: len(x) // 2 + 4]))
    torch.testing.assert_close(grads(modules), {s: expected[s] for s in modules})
    if count - 1 in modules:
        for found in (out, evaluated):
            torch.testing.assert_close(found, model(x).detach())
        assert len(losses) == microbatches
    else:
        assert out is None and evaluated is None and losses == []
    return "done"


@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_two_processes_give_the_gradients_of_the_model(tmp_path, name):
    assert run(train, 2, tmp_path / "store", name, 13, 4) == ["done"] * 2


@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble"])
def test_four_processes_give_the_gradients_of_the_model(tmp_path, name):
    assert run(train, 4, tmp_path / "store", name, 16, 8) == ["done"] * 4


def train_replicas(rank, size, name, kind):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))

    def wrap(module):
        if kind == "ddp":
            return nn.parallel.DistributedDataParallel(module, process_group=mesh.get_group("dp"))
        return fully_shard(module, mesh=mesh["dp"], reshard_after_forward=False)

    schedule, modules, count = make(name, 4, mesh.get_group("pp"), wrap)
    replica = mesh.get_local_rank("dp")
    for seed in (0, 10):
        step(schedule, modules, count, *batch(8, seed + replica))
    expected, _ = reference(count, *(batch(8, seed + r) for seed in (0, 10) for r in range(2)))
    found = {
        s: [g.full_tensor() if hasattr(g, "full_tensor") else g for g in of_stage]
        for s, of_stage in grads(modules).items()
    }
    torch.testing.assert_close(found, {s: [g / 2 for g in expected[s]] for s in modules})
    return "done"


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble", "DualPipeV"])
def test_wrapped_stages_average_over_replicas(tmp_path, name, kind):
    assert run(train_replicas, 4, tmp_path / "store", name, kind) == ["done"] * 4


class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("broken")


def fail(rank, size):
    schedule, modules, count = make("1F1B", 4, wrap=lambda module: Broken() if rank == 1 else module)
    with pytest.raises(pe.PipelineError) as caught:
        step(schedule, modules, count, *batch(8))
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_process_that_raises_is_named_in_the_others(tmp_path):
    first, second = run(fail, 2, tmp_path / "store")
    assert first.startswith("PeerError") and "process 1" in first and "broken" in first
    assert second.startswith("StageError") and "1F0" in second


def differ(rank, size):
    schedule, modules, count = make("1F1B", 4 if rank == 0 else 5)
    with pytest.raises(pe.InvalidArgument, match="n_microbatches|schedule"):
        step(schedule, modules, count, *batch(20))
    return "refused"


def test_processes_with_different_schedules_are_refused(tmp_path):
    assert run(differ, 2, tmp_path / "store") == ["refused"] * 2


def skip(rank, size):
    from pipeline_ext import pipelining

    model = Skips()
    pipe = pipelining.pipeline(model, (batch(8)[0][:2],))
    stage = pipe.build_stage(rank, CPU)
    schedule = pipelining.ScheduleGPipe(stage, 4, loss_fn=mse_loss)
    x, y = batch(8)
    schedule.step(*([x] if rank == 0 else []), target=y if rank == size - 1 else None)
    same = Skips()
    mse_loss(same(x), y).backward()
    expected = dict(same.named_parameters())
    for name, parameter in stage.submod.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad)
    return "done"


class Skips(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = layer(0), layer(1), layer(2)

    def forward(self, x):
        from pipeline_ext import pipelining

        first = self.a(x)
        pipelining.pipe_split()
        second = self.b(first)
        pipelining.pipe_split()
        return self.c(second) + first


def test_a_skip_connection_passes_through_the_process_between(tmp_path):
    assert run(skip, 3, tmp_path / "store") == ["done"] * 3
