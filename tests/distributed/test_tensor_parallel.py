"""Stages whose linear layers several processes share out (tensor parallelism), in a dimension of their own."""

import pytest
import torch
import torch.nn.functional as F
from processes import outcomes, run
from reference import reference_step, twin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pipeline_ext as pe

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


def train(schedule):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    plain = made(4 if schedule in ("interleaved-1f1b", "zbv") else 2)
    stages = [parallelize_module(stage, mesh["tp"], PLAN) for stage in twin(plain)]
    x, y = batch()
    with pe.Pipeline(stages, None, COUNT, schedule, F.mse_loss, mesh=mesh, timeout=20) as pipe:
        assert not pipe.plan.reactive
        for _ in range(2):
            pipe.step(x, target=y)
            reference_step(plain, x, y, COUNT, F.mse_loss)
        check(pipe, plain)
        out = pipe.eval(x)
        if out is not None:
            torch.testing.assert_close(out, plain(x))


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


class Shared(Block):
    """Hands on a DTensor."""

    def __init__(self, mesh):
        super().__init__()
        self.mesh = mesh

    def forward(self, x):
        return DTensor.from_local(super().forward(x), self.mesh, [Replicate()])


def hand_on():
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "tp"))
    stages = [Shared(mesh["tp"]), Block()]
    x, y = batch()
    with pe.Pipeline(stages, None, COUNT, loss_fn=F.mse_loss, mesh=mesh, timeout=20) as pipe:
        pipe.step(x, target=y)


def test_a_dtensor_from_stage_to_stage_is_refused():
    first, second = outcomes(2, hand_on)
    assert first.kind is pe.StageError and second.kind is pe.PeerError
    for outcome in (first, second):
        assert "return its to_local() or full_tensor()" in outcome.message


def refuse():
    mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("dp", "pp", "tp"))
    stage = parallelize_module(Block(), mesh["tp"], PLAN)
    with pytest.raises(pe.InvalidArgument, match=r"wrap its stage in fully_shard"):
        pe.Pipeline([stage], None, COUNT, loss_fn=F.mse_loss, mesh=mesh, reactive=False)
    with pytest.raises(pe.InvalidArgument, match="in one order; give overlap=False and reactive=False"):
        pe.Pipeline([stage], None, COUNT, loss_fn=F.mse_loss)


def test_replicas_without_fully_shard_and_other_orders_are_refused():
    run(2, refuse)
