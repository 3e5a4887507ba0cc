"""The drop-in for torch.distributed.pipelining, all stages in one process."""

import functools
import gc
import inspect
import subprocess
import sys
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import config
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint

from pipeline_ext import InvalidArgument, Pipeline, StageError

torch_pipelining = pytest.importorskip("torch.distributed.pipelining")

from custom_pairs import run_pair  # noqa: E402

from pipeline_ext import pipelining  # noqa: E402
from pipeline_ext.pipelining import schedules  # noqa: E402
from pipeline_ext.pipelining import stage as stage_module  # noqa: E402

SINGLE = ["GPipe", "1F1B"]
MULTI = ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
CPU = torch.device("cpu")
M = 4


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def layers(count, width=8):
    generator = torch.Generator().manual_seed(5)
    made = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count)]
    for parameter in (p for layer in made for p in layer.parameters()):
        nn.init.normal_(parameter, generator=generator)
    return made


def batch(rows=8, width=8):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, rows, width, generator=generator).unbind()


def schedule_of(name, modules=None, loss_fn=mse_loss, microbatches=M, **options):
    """A schedule and its stages' modules."""
    schedule = pipelining.schedules.get_schedule_class(name)
    modules = modules or layers(1 if name in SINGLE else 2)
    stages = [pipelining.PipelineStage(m, i, len(modules), CPU) for i, m in enumerate(modules)]
    return schedule(stages[0] if name in SINGLE else stages, microbatches, loss_fn=loss_fn, **options), modules


def grads(modules):
    return [p.grad for module in modules for p in module.parameters()]


def reference(modules, *batches, loss_fn=mse_loss):
    model = nn.Sequential(*modules)
    for x, y in batches:
        loss_fn(model(x), y).backward()
    return grads(modules)


@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_gradients_losses_and_outputs_are_those_of_the_model(name):
    schedule, modules = schedule_of(name)
    x, y = batch()
    losses = [None]
    out = schedule.step(x, target=y, losses=losses)
    same = layers(len(modules))
    torch.testing.assert_close(grads(modules), reference(same, (x, y)))
    torch.testing.assert_close(out, nn.Sequential(*same)(x).detach())
    expected = [mse_loss(a, b) for a, b in zip(out.chunk(M), y.chunk(M))]
    torch.testing.assert_close(losses, expected, check_device=False)


@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_gradients_accumulate_over_steps(name):
    schedule, modules = schedule_of(name)
    x, y = batch()
    schedule.step(x, target=y)
    schedule.step(x + 1, target=y)
    torch.testing.assert_close(grads(modules), reference(layers(len(modules)), (x, y), (x + 1, y)))


@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_eval_leaves_pending_gradients_alone(name):
    schedule, modules = schedule_of(name)
    x, y = batch()
    schedule.step(x, target=y)
    before = [g.clone() for g in grads(modules)]
    losses = []
    out = schedule.eval(x, target=y, losses=losses)
    assert all(map(torch.equal, grads(modules), before))
    torch.testing.assert_close(out, nn.Sequential(*modules)(x).detach())
    assert len(losses) == M


class Scaled(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x, factor=None):
        return self.body(x if factor is None else x * factor)


@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_microbatches_may_be_given_as_in_torch_2_14(name):
    schedule, modules = schedule_of(name, [Scaled(layer) for layer in layers(1 if name in SINGLE else 2)])
    x, y = batch()
    args, targets = [(part,) for part in x.chunk(M)], list(y.chunk(M))
    losses = []
    schedule.step(arg_mbs=args, kwarg_mbs=[{}] * M, target_mbs=targets, losses=losses)
    same = layers(len(modules))
    torch.testing.assert_close(grads(modules), reference(same, (x, y)))
    expected = nn.Sequential(*same)(x).detach()
    each = [mse_loss(a, b) for a, b in zip(expected.chunk(M), targets)]
    torch.testing.assert_close(losses, each)
    out = schedule.eval(arg_mbs=args, kwarg_mbs=None, target_mbs=targets, losses=losses)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(losses, each)
    torch.testing.assert_close(schedule.eval(x, target=y, losses=losses), expected)
    torch.testing.assert_close(schedule.eval(arg_mbs=args), expected)
    if name in SINGLE:  # each stage of a process gets the same keyword arguments
        out = schedule.eval(arg_mbs=args, kwarg_mbs=[{"factor": float(m)} for m in range(M)])
        scaled = torch.cat([part * m for m, part in enumerate(x.chunk(M))])
        torch.testing.assert_close(out, nn.Sequential(*same)(scaled).detach())


def test_microbatches_that_do_not_fit_are_refused():
    schedule, modules = schedule_of("1F1B")
    x, y = batch()
    args, targets = [(part,) for part in x.chunk(M)], list(y.chunk(M))
    for call in (schedule.step, schedule.eval):
        with pytest.raises(InvalidArgument, match="both given"):
            call(x, arg_mbs=args, target_mbs=targets)
        with pytest.raises(InvalidArgument, match="both given"):
            call(arg_mbs=args, target_mbs=targets, target=y)
        with pytest.raises(TypeError, match=r"arg_mbs\[0\] is a Tensor; give a tuple for each microbatch"):
            call(arg_mbs=list(x.chunk(M)), target_mbs=targets)
        with pytest.raises(TypeError, match=r"kwarg_mbs\[0\] is a tuple; give a dict"):
            call(kwarg_mbs=args, target_mbs=targets)
        with pytest.raises(ValueError, match="4 arg_mbs but got 3"):
            call(arg_mbs=args[1:], target_mbs=targets)
    assert grads(modules) == [None, None]


@pytest.mark.parametrize("rows", [7, 10])
def test_a_batch_need_not_divide_by_the_microbatches(rows):
    schedule, modules = schedule_of("Interleaved1F1B")
    x, y = batch(rows)
    schedule.step(x, target=y)
    torch.testing.assert_close(grads(modules), reference(layers(2), (x, y)))


def test_shapes_may_change_from_step_to_step():
    schedule, _modules = schedule_of("Interleaved1F1B")
    for rows in (8, 16):
        x, y = batch(rows)
        assert schedule.step(x, target=y).shape == x.shape


def test_the_first_step_runs_no_forward_of_its_own():
    norm = nn.BatchNorm1d(8)
    schedule, _ = schedule_of("Interleaved1F1B", [norm, *layers(1)])
    x, y = batch()
    schedule.step(x, target=y)
    assert norm.num_batches_tracked == M


def test_integers_pass_between_stages():
    class Number(nn.Module):
        def forward(self, x):
            return x.argmax(1)

    schedule, modules = schedule_of("Interleaved1F1B", [Number(), nn.Embedding(8, 8)])
    x, y = batch()
    schedule.step(x, target=y)
    assert modules[1].weight.grad is not None


def test_losses_belong_to_their_microbatch_in_any_order(tmp_path):
    path = tmp_path / "order.csv"
    path.write_text("0F1,0F0,1F1,1F0,1B0,0B0,1B1,0B1\n")
    modules = layers(2)
    stages = [pipelining.PipelineStage(m, i, 2, CPU) for i, m in enumerate(modules)]
    schedule = schedules._PipelineScheduleRuntime(stages, 2, loss_fn=mse_loss)
    schedule._load_csv(str(path))
    x, y = batch()
    losses = []
    out = schedule.step(x, target=y, losses=losses)
    torch.testing.assert_close(grads(modules), reference(layers(2), (x, y)))
    torch.testing.assert_close(losses, [mse_loss(a, b) for a, b in zip(out.chunk(2), y.chunk(2))])


def test_another_order_may_be_loaded_between_steps(tmp_path):
    schedule, modules = schedule_of("Interleaved1F1B", microbatches=2)
    x, y = batch()
    schedule.step(x, target=y)
    path = tmp_path / "order.csv"
    path.write_text("0F0,1F0,1B0,0B0,0F1,1F1,1B1,0B1\n")
    schedule._load_csv(str(path), "compute_only")
    schedule.step(x, target=y)
    torch.testing.assert_close(grads(modules), reference(layers(2), (x, y), (x, y)))


@pytest.mark.parametrize("name", ["InterleavedZeroBubble", "ZBVZeroBubble"])
def test_behind_a_frozen_first_stage_weights_get_gradients(name):
    modules, same = layers(2), layers(2)
    for pair in (modules, same):
        pair[0].requires_grad_(False)
    schedule, _ = schedule_of(name, modules)
    x, y = batch()
    schedule.step(x, target=y)
    torch.testing.assert_close(grads(modules), reference(same, (x, y)))


def test_dicts_are_outputs_and_targets():
    class ToDict(nn.Linear):
        def forward(self, x):
            return {"a": super().forward(x), "b": x * 2}

    class OfDict(nn.Linear):
        def forward(self, given):
            return {"out": super().forward(given["a"]) + given["b"]}

    schedule, modules = schedule_of(
        "Interleaved1F1B",
        [ToDict(8, 8), OfDict(8, 8)],
        loss_fn=lambda out, target: mse_loss(out["out"], target["y"]),
    )
    x, y = batch()
    out = schedule.step(x, target={"y": y})
    assert out["out"].shape == y.shape
    assert all(g is not None for g in grads(modules))


def test_checkpointing_recomputes_once_under_split_backward():
    calls = []

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*layers(3))

        def forward(self, x):
            return checkpoint(self.run, x, use_reentrant=False)

        def run(self, x):
            calls.append(None)
            return self.body(x)

    schedule, _ = schedule_of("InterleavedZeroBubble", [layers(1)[0], Recomputed()])
    x, y = batch()
    schedule.step(x, target=y)
    assert len(calls) == 2 * M


def test_skip_connections_of_a_traced_model_work():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = layers(3)

        def forward(self, x):
            first = self.a(x)
            pipelining.pipe_split()
            second = self.b(first)
            pipelining.pipe_split()
            return self.c(second) + first

    model, x_y = Skips(), batch()
    pipe = pipelining.pipeline(model, (x_y[0][:2],))
    stages = [pipe.build_stage(i, CPU) for i in range(3)]
    x, y = x_y
    schedule = pipelining.ScheduleInterleaved1F1B(stages, M, loss_fn=mse_loss)
    schedule.step(x, target=y)
    same = Skips()
    mse_loss(same(x), y).backward()
    found = {n: p.grad for s in stages for n, p in s.submod.named_parameters()}
    torch.testing.assert_close(found, {n: p.grad for n, p in same.named_parameters()})


def test_a_stage_that_raises_is_named_and_the_next_step_works():
    class Raises(nn.Module):
        broken = True

        def forward(self, x):
            if self.broken:
                raise ValueError("broken")
            return x

    schedule, modules = schedule_of("Interleaved1F1B", [layers(1)[0], Raises()])
    x, y = batch()
    with pytest.raises(StageError, match="stage 1"):
        schedule.step(x, target=y)
    modules[1].broken = False
    schedule.step(x, target=y)
    assert grads(modules)[0] is not None


def test_a_custom_function_runs_pairs_with_the_stages_methods():
    pairs = []
    schedule, modules = schedule_of("DualPipeV")
    schedule.register_custom_function(schedules.OVERLAP_F_B, functools.partial(run_pair, pairs))
    x, y = batch()
    schedule.step(x, target=y)
    schedule.step(x, target=y)
    assert pairs
    torch.testing.assert_close(grads(modules), reference(layers(2), (x, y), (x, y)))


def test_a_torch_stage_is_itself_again_after_a_step():
    schedule, _ = schedule_of("Interleaved1F1B")
    x, y = batch()
    schedule.step(x, target=y)
    assert all("forward_one_chunk" not in vars(stage) for stage in schedule._stages)


def test_sums_are_not_scaled():
    def total(out, target):
        return mse_loss(out, target, reduction="sum")

    schedule, modules = schedule_of("Interleaved1F1B", loss_fn=total, scale_grads=False)
    x, y = batch()
    schedule.step(x, target=y)
    torch.testing.assert_close(grads(modules), reference(layers(2), (x, y), loss_fn=total))


@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_the_loss_function_gets_its_keyword_arguments(name):
    def scaled(out, target, *, factor):
        return mse_loss(out, target) * factor

    schedule, modules = schedule_of(name, loss_fn=scaled)
    x, y = batch()
    schedule.step(x, target=y, loss_kwargs={"factor": 3.0})
    expected = reference(layers(len(modules)), (x, y), loss_fn=functools.partial(scaled, factor=3.0))
    torch.testing.assert_close(grads(modules), expected)


def test_ddp_stages_reduce_once_a_step():
    modules = [nn.parallel.DistributedDataParallel(layer) for layer in layers(2)]
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    for module in modules:
        module.register_comm_hook(None, hook)
    schedule, _ = schedule_of("InterleavedZeroBubble", modules)
    x, y = batch()
    schedule.step(x, target=y)
    assert len(reduced) == 2
    torch.testing.assert_close(grads(modules), reference(layers(2), (x, y)))


@pytest.mark.parametrize("name", MULTI)
def test_switches_of_later_torch_for_receives_are_taken(name):
    schedule, modules = schedule_of(name, defer_pp_recv=True, reuse_recv_buffers=True)
    x, y = batch()
    schedule.step(x, target=y)
    torch.testing.assert_close(grads(modules), reference(layers(2), (x, y)))


SWITCHES = [name for name in stage_module._SWITCHES if hasattr(config, name)]


@pytest.mark.skipif(not SWITCHES, reason="this torch has no switches for communicators")
def test_switches_for_communicators_are_taken_where_the_group_cannot_be_split():
    with config.patch(dict.fromkeys(SWITCHES, True)):
        with pytest.raises(RuntimeError, match="not safe to split"):
            torch_pipelining.PipelineStage(layers(1)[0], 0, 2, CPU)
        schedule, modules = schedule_of("Interleaved1F1B")
        x, y = batch()
        schedule.step(x, target=y)
        assert all(getattr(config, name) for name in SWITCHES)
    torch.testing.assert_close(grads(modules), reference(layers(2), (x, y)))


def test_a_stage_is_one_of_torch_s_with_its_signature():
    assert issubclass(pipelining.PipelineStage, torch_pipelining.PipelineStage)
    ours, torchs = (inspect.signature(kind.PipelineStage) for kind in (pipelining, torch_pipelining))
    assert ours == torchs


def test_it_is_put_in_place_of_torch_s_in_sys_modules():
    code = """
import sys
import pipeline_ext
assert "torch.distributed.pipelining" not in sys.modules
import pipeline_ext.pipelining
for name in [n for n in sys.modules if n.startswith("torch.distributed.pipelining")]:
    sys.modules[name] = sys.modules[name.replace("torch.distributed", "pipeline_ext", 1)]
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.pipelining.schedules import _Action, get_schedule_class
from torch.distributed.pipelining.microbatch import TensorChunkSpec
from torch.distributed.pipelining._utils import PipeInfo
assert get_schedule_class("gpipe") is ScheduleGPipe is pipeline_ext.pipelining.ScheduleGPipe
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def no_collector():
    """Without the garbage collector, so that what goes, goes by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("last", ["step", "eval", "a failed step"])
@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_a_schedule_is_freed_with_its_last_reference(name, last, no_collector):
    schedule, modules = schedule_of(name)
    x, y = batch()
    schedule.step(x, target=y)
    if last == "eval":
        schedule.eval(x, target=y)
    elif last == "a failed step":
        with pytest.raises(StageError) as caught:
            schedule.step(x[:, :3], target=y)
        del caught
    runner = schedule._runner
    parts = [schedule, runner, runner._engine, *runner._stages.values(), *modules]
    parts += [stage.torch_stage for stage in runner._stages.values()]
    alive = [weakref.ref(part) for part in parts]
    close = runner._lifetime._close
    assert close.alive
    del schedule, modules, runner, parts
    assert [ref() for ref in alive if ref() is not None] == []
    assert not close.alive  # its threads have ended


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zbv", "dualpipev"])
def test_a_pipeline_is_freed_with_its_last_reference(name, overlap, no_collector):
    model = nn.Sequential(*layers(4))
    x, y = batch()
    pipe = Pipeline(
        model,
        num_stages=4,
        microbatches=M,
        schedule=name,
        loss_fn=mse_loss,
        devices=[CPU] * (2 if name in ("interleaved-1f1b", "zbv", "dualpipev") else 4),
        overlap=overlap,
    )
    pipe.step(x, target=y)
    pipe.eval(x)
    with pytest.raises(StageError) as caught:
        pipe.step(x[:, :3], target=y)
    del caught
    alive = [weakref.ref(pipe), weakref.ref(model)]
    del pipe, model
    assert [ref() for ref in alive if ref() is not None] == []
