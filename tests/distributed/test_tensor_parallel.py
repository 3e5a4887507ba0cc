"""Stages whose linear layers several processes share out (tensor parallelism), in a dimension of their own."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import outcomes, run
from reference import reference_step, twin
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pipeline_ext as pe
from pipeline_ext.pipelining import PipelineStage, Schedule1F1B

COUNT = 4  # microbatches
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


def made(stages):
    torch.manual_seed(1)
    return nn.Sequential(*(Block() for _ in range(stages)))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch(rows=8):
    return torch.randn(2, rows, 12, generator=torch.Generator().manual_seed(2))


def check(pipe, plain):
    """Gradients, their norm, and what is clipped, are the plain model's."""
    expected = dict(plain.named_parameters())
    named = dict(pipe.named_parameters())
    for name, p in named.items():
        torch.testing.assert_close(whole(p.grad), expected[name].grad)
    total = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    torch.testing.assert_close(pipe.clip_grad_norm_(0.1), total)
    for name, p in named.items():
        torch.testing.assert_close(whole(p.grad), expected[name].grad)


def train_like(plain, stages, schedule, mesh):
    """Two steps and an evaluation of a pipeline of these stages do what the plain model's do."""
    x, y = batch()
    with pe.Pipeline(stages, None, COUNT, schedule, F.mse_loss, mesh=mesh, timeout=20) as pipe:
        assert pipe.plan.reactive
        for _ in range(2):
            pipe.step(x, target=y)
            reference_step(plain, x, y, COUNT, F.mse_loss)
        check(pipe, plain)
        out = pipe.eval(x)
        if out is not None:
            torch.testing.assert_close(out, plain(x))


def train(schedule):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    plain = made(4 if schedule in ("interleaved-1f1b", "zbv") else 2)
    stages = [parallelize_module(stage, mesh["tp"], PLAN) for stage in twin(plain)]
    train_like(plain, stages, schedule, mesh)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved-1f1b", "zbv"])
def test_gradients_and_their_norm_are_the_unsplit_model_s(schedule):
    run(4, train, schedule)


def train_sharded():
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "pp", "tp"))
    plain = made(1)
    (stage,) = (parallelize_module(stage, mesh["tp"], PLAN) for stage in twin(plain))
    fully_shard(stage, mesh=mesh["dp"])
    x, y = batch(16)
    part = slice(None, 8) if mesh.get_local_rank("dp") == 0 else slice(8, None)
    with pe.Pipeline([stage], None, COUNT, loss_fn=F.mse_loss, mesh=mesh, timeout=20) as pipe:
        pipe.step(x[part], target=y[part])
        reference_step(plain, x, y, COUNT, F.mse_loss)
        check(pipe, plain)


def test_fully_shard_over_replicas_goes_with_it():
    run(4, train_sharded)


class Up(nn.Module):
    """Hands on a DTensor that is shared out, and a whole one."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 24)

    def forward(self, x):
        return {"up": self.up(x).relu(), "x": x}


class Down(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(24, 12)

    def forward(self, value):
        return value["x"] + self.down(value["up"])


UP, DOWN = {"up": ColwiseParallel(use_local_output=False)}, {"down": RowwiseParallel(input_layouts=Shard(-1))}


def hand_on(schedule):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    torch.manual_seed(1)
    halves = (Up, Down) * (2 if schedule == "interleaved-1f1b" else 1)
    plain = nn.Sequential(*(half() for half in halves))
    stages = [parallelize_module(stage, mesh["tp"], (UP, DOWN)[i % 2]) for i, stage in enumerate(twin(plain))]
    train_like(plain, stages, schedule, mesh)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "interleaved-1f1b"])
def test_a_dtensor_goes_from_stage_to_stage(schedule):
    run(4, hand_on, schedule)


class Relu(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(12, 24)

    def forward(self, x):
        return self.up(x).relu()


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Linear(24, 12)

    def forward(self, x):
        assert isinstance(x, DTensor) == isinstance(self.down.weight, DTensor)
        return self.down(x)


def hand_on_in_place():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    torch.manual_seed(1)
    plain = nn.Sequential(Relu(), Last())
    place = mesh.get_local_rank("pp")
    module = parallelize_module(twin(plain)[place], mesh["tp"], (UP, DOWN)[place])
    stage = PipelineStage(module, place, 2, torch.device("cpu"), group=mesh.get_group("pp"))
    runner = Schedule1F1B(stage, COUNT, loss_fn=F.mse_loss)
    x, y = batch()
    runner.step(*([x] if place == 0 else []), **({"target": y} if place == 1 else {}))
    reference_step(plain, x, y, COUNT, F.mse_loss)
    for name, p in module.named_parameters():
        torch.testing.assert_close(whole(p.grad), plain[place].get_parameter(name).grad)


def test_a_dtensor_goes_from_stage_to_stage_of_torch_s_too():
    run(4, hand_on_in_place)


class Placed(nn.Module):
    """Hands on a DTensor on a mesh of its own."""

    def forward(self, x):
        mesh = DeviceMesh("cpu", [dist.get_rank()], mesh_dim_names=("elsewhere",))
        return DTensor.from_local(x, mesh, [Replicate()])


def hand_on_from_elsewhere():
    with pe.Pipeline(
        [Placed(), Block()], None, COUNT, loss_fn=F.mse_loss, mesh=dist.group.WORLD, timeout=20
    ) as pipe:
        x, y = batch()
        pipe.step(x, target=y)


def test_a_dtensor_on_a_mesh_that_the_next_stage_does_not_know_is_refused():
    first, second = outcomes(2, hand_on_from_elsewhere)
    assert first.kind is pe.PeerError and second.kind is pe.StageError
    assert "on a mesh with dimensions named elsewhere, and has no such mesh" in second.message


def refuse():
    mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("dp", "pp", "tp"))
    stage = parallelize_module(Block(), mesh["tp"], PLAN)
    with pytest.raises(pe.InvalidArgument, match=r"wrap its stage in fully_shard"):
        pe.Pipeline([stage], None, COUNT, loss_fn=F.mse_loss, mesh=mesh, reactive=False)
    with pytest.raises(pe.InvalidArgument, match="in one order; give overlap=False and reactive=False"):
        pe.Pipeline([stage], None, COUNT, loss_fn=F.mse_loss)


def test_replicas_without_fully_shard_and_other_orders_are_refused():
    run(2, refuse)
