"""The drop-in for torch.distributed.pipelining with a process for each rank."""

import functools
import gc
import itertools
import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import Gone, die, freeze, outcomes, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss

import pipeline_ext as pe

torch_pipelining = pytest.importorskip("torch.distributed.pipelining")
torch_schedules = torch_pipelining.schedules

from custom_pairs import run_pair  # noqa: E402

CPU = torch.device("cpu")
WIDTH = 8
SINGLE = ["GPipe", "1F1B"]
V_SHAPED = ["ZBVZeroBubble", "DualPipeV"]
MULTI = ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", *V_SHAPED]


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


def peers(name, microbatches):
    """Torch's own schedule of the same stages."""
    here, count = local_stages(name, dist.get_rank(), dist.get_world_size())
    modules = {s: layer(s) for s in here}
    stages = [torch_pipelining.PipelineStage(m, s, count, CPU) for s, m in modules.items()]
    schedule = torch_schedules.get_schedule_class(name)
    return schedule(stages[0] if name in SINGLE else stages, microbatches, loss_fn=mse_loss), modules, count


def reference(count, *batches):
    model = nn.Sequential(*(layer(s) for s in range(count)))
    for x, y in batches:
        mse_loss(model(x), y).backward()
    return {s: [p.grad for p in m.parameters()] for s, m in enumerate(model)}, model


def train(name, rows, microbatches):
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
def test_two_processes_give_the_gradients_of_the_model(name):
    assert run(2, train, name, 13, 4) == ["done"] * 2


def train_on_microbatches(name):
    schedule, modules, count = make(name, 4)
    x, y = batch(8)
    parts = {
        "arg_mbs": [(part,) for part in x.chunk(4)] if 0 in modules else None,
        "kwarg_mbs": None,
        "target_mbs": list(y.chunk(4)) if count - 1 in modules else None,
    }
    out = schedule.step(**parts)
    expected, model = reference(count, (x, y))
    torch.testing.assert_close(grads(modules), {s: expected[s] for s in modules})
    evaluated = schedule.eval(**parts)
    assert (out is None) == (evaluated is None) == (count - 1 not in modules)
    if out is not None:
        torch.testing.assert_close([out, evaluated], [model(x).detach()] * 2)


@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_microbatches_may_be_given_in_each_process(name):
    run(2, train_on_microbatches, name)


def train_staged(name):
    """As on a GPU, but for the copies, which go from the CPU to the CPU."""
    from pipeline_ext.pipelining import make_engine as engine
    from pipeline_ext.transport import staged

    moved = []

    def on(leaf, device):
        moved.append(device)
        return move(leaf, device)

    move, staged._on = staged._on, on
    engine.ProcessEngine = functools.partial(
        engine.ProcessEngine,
        channel_types=(staged.StagedSender, functools.partial(staged.StagedReceiver, device=CPU)),
    )
    train(name, 13, 4)
    return bool(moved)


@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble"])
def test_messages_of_gpus_pass_through_the_host(name):
    assert run(2, train_staged, name) == [True, True]


def train_few():
    """On one microbatch, and on fewer than there are stages; sequences have another length in each step."""
    for name, microbatches in itertools.product(SINGLE + MULTI, (1, 3)):
        if name == "DualPipeV":  # whose order needs as many microbatches as stages
            continue
        schedule, modules, count = make(name, microbatches)
        batches = [torch.randn(2, rows, length, WIDTH) for rows, length in ((7, 5), (7, 2), (4, 9))]
        for x, y in batches:
            step(schedule, modules, count, x, y)
        expected, _ = reference(count, *batches)
        found = {(name, microbatches, s): of_stage for s, of_stage in grads(modules).items()}
        torch.testing.assert_close(found, {key: expected[key[-1]] for key in found})


def test_few_microbatches_and_sequences_of_any_length_give_the_gradients_of_the_model():
    run(2, train_few)


def compare(name):
    ours, theirs = make(name, 4), peers(name, 4)
    x, y = batch(8)
    out, losses = step(*ours, x, y)
    expected, their_losses = step(*theirs, x, y)
    torch.testing.assert_close(grads(ours[1]), grads(theirs[1]))
    torch.testing.assert_close(losses, their_losses)
    if expected is not None:
        torch.testing.assert_close(out, expected.detach())


@pytest.mark.parametrize("name", ["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_gradients_losses_and_outputs_are_those_of_torch_s_own_classes(name):
    if name == "ZBVZeroBubble" and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 sends from a process to itself here, which gloo cannot")
    run(2, compare, name)


@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble"])
def test_four_processes_give_the_gradients_of_the_model(name):
    assert run(4, train, name, 16, 8) == ["done"] * 4


def train_replicas(name, kind):
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
def test_wrapped_stages_average_over_replicas(name, kind):
    assert run(4, train_replicas, name, kind) == ["done"] * 4


class Mlp(nn.Sequential):
    def __init__(self, seed):
        super().__init__(layer(seed), layer(seed + 10))


def train_tensor_parallel(name):
    from pipeline_ext import pipelining

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    plan = {"0.0": ColwiseParallel(), "1.0": RowwiseParallel()}
    here, count = local_stages(name, mesh.get_local_rank("pp"), 2)
    modules = {s: parallelize_module(Mlp(s), mesh["tp"], plan) for s in here}
    group = mesh.get_group("pp")
    stages = [pipelining.PipelineStage(m, s, count, CPU, group=group) for s, m in modules.items()]
    schedule = pipelining.schedules.get_schedule_class(name)
    x, y = batch(8)
    step(schedule(stages[0] if name in SINGLE else stages, 4, loss_fn=mse_loss), modules, count, x, y)
    model = nn.Sequential(*(Mlp(s) for s in range(count)))
    mse_loss(model(x), y).backward()
    for s, module in modules.items():
        found = [p.grad.full_tensor() if isinstance(p, DTensor) else p.grad for p in module.parameters()]
        torch.testing.assert_close(found, [p.grad for p in model[s].parameters()])


@pytest.mark.parametrize("name", ["1F1B", "InterleavedZeroBubble"])
def test_stages_may_be_tensor_parallel(name):
    run(4, train_tensor_parallel, name)


def train_pairs():
    from pipeline_ext.pipelining.schedules import OVERLAP_F_B

    pairs = []
    schedule, modules, count = make("DualPipeV", 8)
    schedule.register_custom_function(OVERLAP_F_B, functools.partial(run_pair, pairs))
    x, y = batch(8)
    step(schedule, modules, count, x, y)
    expected, _ = reference(count, (x, y))
    torch.testing.assert_close(grads(modules), {s: expected[s] for s in modules})
    assert pairs


def test_a_custom_function_runs_pairs_in_each_process():
    run(2, train_pairs)


class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("broken")


def fail():
    schedule, modules, count = make("1F1B", 4, wrap=lambda module: Broken() if dist.get_rank() == 1 else module)
    with pytest.raises(pe.PipelineError) as caught:
        step(schedule, modules, count, *batch(8))
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_process_that_raises_is_named_in_the_others():
    first, second = run(2, fail)
    assert first.startswith("PeerError") and "process 1" in first and "broken" in first
    assert second.startswith("StageError") and "1F0" in second


class Dies(nn.Linear):
    calls = 0

    def forward(self, x):
        Dies.calls += 1
        if Dies.calls == 3:
            die()
        return super().forward(x)


def lose_a_process():
    schedule, modules, count = make(
        "1F1B", 4, wrap=lambda module: Dies(WIDTH, WIDTH) if dist.get_rank() == 1 else module
    )
    with pytest.raises(pe.PeerError) as caught:
        step(schedule, modules, count, *batch(8))
    return str(caught.value)


def test_a_process_that_is_killed_is_named_with_what_was_waited_for():
    first, second = outcomes(2, lose_a_process)
    assert isinstance(second, Gone)
    assert "rank 1" in first and "the gradients of microbatch" in first and "boundary 0" in first


class Freezes(nn.Linear):
    def forward(self, x):
        freeze()


def wait_for_a_frozen_process():
    group = dist.new_group(timeout=timedelta(seconds=3))
    second = dist.get_rank() == 1
    schedule, modules, count = make(
        "1F1B", 4, group, wrap=lambda module: Freezes(WIDTH, WIDTH) if second else module
    )
    with pytest.raises(pe.StepTimeout) as caught:
        step(schedule, modules, count, *batch(8))
    return str(caught.value)


def test_the_timeout_is_the_group_s():
    first, second = outcomes(2, wait_for_a_frozen_process)
    assert isinstance(second, Gone)
    assert "for 3 seconds" in first and "the gradients of microbatch 0 across boundary 0 from rank 1" in first


def evaluate_for_a_frozen_process():
    group = dist.new_group(timeout=timedelta(seconds=3))
    second = dist.get_rank() == 1
    schedule, _, _ = make("GPipe", 4, group, wrap=lambda module: Freezes(WIDTH, WIDTH) if second else module)
    with pytest.raises(pe.StepTimeout) as caught:
        schedule.eval(*([] if second else [batch(8000)[0]]))
    with pytest.raises(pe.DeadPipeline):
        schedule.eval(batch(8)[0])
    return str(caught.value)


def test_what_nobody_receives_is_waited_for_within_the_timeout():
    first, second = outcomes(2, evaluate_for_a_frozen_process)
    assert isinstance(second, Gone)
    assert "3 seconds" in first and "process 1 does not answer" in first, first


def raise_and_stay():
    """Process 0 raises when all is on its way to it, and lives on until process 1 has left its step."""
    schedule, modules, count = make("GPipe", 4)
    for parameter in modules[0].parameters() if 0 in modules else ():
        parameter.register_hook(_refuse)
    try:
        step(schedule, modules, count, *batch(4000))
    except pe.PipelineError as error:
        return type(error).__name__
    finally:
        dist.barrier()
    return "done"


def _refuse(grad):
    raise ValueError("refused")


def test_no_process_waits_for_one_that_has_failed_and_lives_on():
    first, second = run(2, raise_and_stay)
    assert first == "StageError" and second in ("done", "PeerError")


def train_behind_a_frozen_stage(name):
    schedule, modules, count = make(name, 4)
    if 0 in modules:
        modules[0].requires_grad_(False)
    x, y = batch(8)
    step(schedule, modules, count, x, y)
    expected, _ = reference(count, (x, y))
    torch.testing.assert_close(grads(modules), {s: expected[s] if s else [None, None] for s in modules})


@pytest.mark.parametrize("name", ["InterleavedZeroBubble", "ZBVZeroBubble"])
def test_behind_a_frozen_first_stage_weights_get_gradients(name):
    run(2, train_behind_a_frozen_stage, name)


def train_as_listed(path, microbatches, format):
    from pipeline_ext.pipelining import PipelineStage, schedules

    rank = dist.get_rank()
    module = layer(rank)
    stage = PipelineStage(module, rank, 2, CPU)
    schedule = schedules._PipelineScheduleRuntime([stage], microbatches, loss_fn=mse_loss)
    schedule._load_csv(path, format)
    x, y = batch(7)
    out, losses = step(schedule, {rank: module}, 2, x, y)
    expected, _ = reference(2, (x, y))
    torch.testing.assert_close(grads({rank: module}), {rank: expected[rank]})
    if rank == 1:
        each = [mse_loss(a, b) for a, b in zip(out.tensor_split(microbatches), y.tensor_split(microbatches))]
        torch.testing.assert_close(losses, each)


def test_losses_belong_to_their_microbatch_in_any_order(tmp_path):
    path = tmp_path / "order.csv"
    path.write_text("0F2,0F0,0F1,0B0,0B2,0B1\n1F2,1F0,1B0,1F1,1B2,1B1\n")
    run(2, train_as_listed, str(path), 3, "compute_only")


def test_receives_listed_ahead_of_sends_do_not_hold_them_up(tmp_path):
    path = tmp_path / "order.csv"
    path.write_text(
        "0F0,0SEND_F0,0RECV_B0,0B0,0F1,0SEND_F1,0RECV_B1,0B1\n"
        "1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n"
    )
    run(2, train_as_listed, str(path), 2, "compute_comms")


def free(name):
    x, y = batch(8)
    schedule, modules, count = make(name, 4)
    gc.collect()
    gc.disable()  # what goes, goes by its last reference
    for call in (schedule.step, schedule.eval):
        call(*([x] if 0 in modules else []), target=y if count - 1 in modules else None)
    runner = schedule._runner
    parts = [schedule, runner, runner._engine, *runner._stages.values(), *modules.values()]
    alive = [weakref.ref(part) for part in parts]
    dist.barrier()  # a process that ends its engine ends the connections
    del schedule, modules, runner, parts, call
    return [type(ref()).__name__ for ref in alive if ref() is not None]


@pytest.mark.parametrize("name", SINGLE + MULTI)
def test_a_schedule_is_freed_with_its_last_reference_in_each_process(name):
    assert run(2, free, name) == [[], []]


def differ():
    schedule, modules, count = make("1F1B", 4 if dist.get_rank() == 0 else 5)
    with pytest.raises(pe.InvalidArgument, match="n_microbatches is 5 in process 1"):
        step(schedule, modules, count, *batch(20))
    return "refused"


def test_processes_with_different_schedules_are_refused():
    assert run(2, differ) == ["refused"] * 2


class ToDict(nn.Module):
    """Batch norm, and integers beside what it returns."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return {"value": self.norm(x), "index": x.argmax(1)}


class OfDict(nn.Embedding):
    def forward(self, given):
        return {"out": super().forward(given["index"]) * given["value"]}


def pass_dicts():
    from pipeline_ext import pipelining

    rank = dist.get_rank()
    torch.manual_seed(3)
    model = nn.Sequential(ToDict(), OfDict(WIDTH, WIDTH))
    stage = pipelining.PipelineStage(model[rank], rank, 2, CPU)
    schedule = pipelining.ScheduleGPipe(stage, 4, loss_fn=loss_of_dicts)
    x, y = batch(8)
    schedule.step(*([] if rank else [x]), target={"y": y} if rank else None)
    assert model[0].norm.num_batches_tracked == (0 if rank else 4)  # no forward but those of the step
    found = [p.grad for p in model[rank].parameters()]
    same = nn.Sequential(ToDict(), OfDict(WIDTH, WIDTH))
    same.load_state_dict(model.state_dict())
    for a, b in zip(x.chunk(4), y.chunk(4)):
        (loss_of_dicts(same(a), {"y": b}) / 4).backward()
    torch.testing.assert_close(found, [p.grad for p in same[rank].parameters()])


def loss_of_dicts(out, target):
    return mse_loss(out["out"], target["y"])


def test_dicts_integers_and_batch_norm_pass_through_processes():
    run(2, pass_dicts)


def hold_few_messages(name, microbatches):
    schedule, modules, count = make(name, microbatches)
    x, y = batch(2 * microbatches)
    for _ in range(2):
        step(schedule, modules, count, x, y)
    return [len(receiver._packets._free) for receiver in schedule._runner._train.exchange._receivers]


def test_memory_for_receives_does_not_grow_with_the_microbatches():
    held = [n for of_process in run(2, hold_few_messages, "1F1B", 32) for n in of_process]
    assert len(held) == 2 and max(held) <= 4


def skip():
    from pipeline_ext import pipelining

    model = Skips()
    pipe = pipelining.pipeline(model, (batch(8)[0][:2],))
    stage = pipe.build_stage(dist.get_rank(), CPU)
    schedule = pipelining.ScheduleGPipe(stage, 4, loss_fn=mse_loss)
    x, y = batch(8)
    schedule.step(*([x] if stage.is_first else []), target=y if stage.is_last else None)
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


def test_a_skip_connection_passes_through_the_process_between():
    assert run(3, skip) == ["done"] * 3
