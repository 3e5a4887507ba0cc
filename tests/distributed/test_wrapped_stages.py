"""Stages in FSDP2's fully_shard or in DistributedDataParallel reduce once in a step; gradients are the mean.

Equal to float32's rounding: over steps FSDP2 adds up means, and the reference is the mean of sums.
"""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import chain
from processes import outcomes, run
from reference import reference_step, twin
from replicas import average, batches
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pipeline_ext as pe

MICROBATCHES = 4
STAGES = 2


def sharded(stage, mesh):
    return fully_shard(sharded_by_layers(stage, mesh), mesh=mesh)


def sharded_by_layers(stage, mesh):
    for layer in stage:
        fully_shard(layer, mesh=mesh)
    return stage


def sharded_as_one(stage, mesh):
    return fully_shard(stage, mesh=mesh)


def replicated(stage, mesh):
    return DistributedDataParallel(stage, process_group=mesh.get_group())


def partly(stage, mesh):
    """The other layers are the pipeline's own to reduce."""
    linear, *others = stage
    return nn.Sequential(replicated(linear, mesh), *others)


def partly_sharded(stage, mesh):
    fully_shard(stage[2], mesh=mesh)
    return stage


def parameters(stages):
    return [p for stage in stages for p in stage.parameters()]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Both:
    """This process's replica, or part of one, its stages wrapped by ``wrap``, and plain models for both.

    A replica is of one process, or of two.
    """

    def __init__(self, model, wrap, schedule, **options):
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "pp"))
        self.rank = mesh.get_local_rank("dp")
        self.plains = [twin(model), twin(model)]
        stages = 2 * STAGES if schedule == "zbv" else STAGES
        layers, size = list(twin(model)), len(model) // stages
        made = [wrap(nn.Sequential(*layers[i * size : (i + 1) * size]), mesh["dp"]) for i in range(stages)]
        if mesh["pp"].size() == 1:
            options["reduction"] = pe.GradientReduction(pe.ProcessGroupMember(dist.group.WORLD))
        else:
            options["mesh"] = mesh
        self.pipe = pe.Pipeline(made, None, MICROBATCHES, schedule, F.mse_loss, timeout=20, **options)
        self.stages = self.pipe.stage_modules
        self.here = [index for index, stage in enumerate(made) if stage in self.stages]
        self.size = size

    def step(self, reduces=True):
        pairs = batches(8)
        x, y = pairs[self.rank]
        self.pipe.step(x, target=y)
        for plain, (a, b) in zip(self.plains, pairs):
            reference_step(plain, a, b, MICROBATCHES, F.mse_loss)
        if reduces:
            average(self.plains)

    def pairs(self):
        """This process's parameters, and the plain model's."""
        plain = [self.plains[0][i * self.size : (i + 1) * self.size] for i in self.here]
        return zip(parameters(self.stages), parameters(plain), strict=True)

    def check(self):
        for ours, plain in self.pairs():
            torch.testing.assert_close(whole(ours.grad), plain.grad, rtol=1e-5, atol=1e-7)

    def zero_grad(self):
        for p in [*parameters(self.stages), *parameters(self.plains)]:
            p.grad = None


def train(wrap, schedule):
    both = Both(chain(), wrap, schedule)
    for _ in range(2):  # gradients add up over steps
        both.step()
        both.check()
    both.zero_grad()
    with both.pipe.no_sync():
        both.step(reduces=False)
    both.step()
    both.check()
    both.zero_grad()
    before = [whole(p).clone() for p in parameters(both.stages)]
    out = both.pipe.eval(torch.ones(4, 12))
    if out is not None:
        torch.testing.assert_close(out, both.plains[0](torch.ones(4, 12)))
    assert all(map(torch.equal, before, map(whole, parameters(both.stages))))
    optimizers = [torch.optim.SGD(parameters(found), 0.1) for found in (both.stages, both.plains)]
    both.step()
    for optimizer in optimizers:
        optimizer.step()
    for ours, plain in both.pairs():
        torch.testing.assert_close(whole(ours), plain)
    both.pipe.close()


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("wrap", [sharded, sharded_by_layers, replicated, partly])
def test_wrapped_stages_have_the_mean_of_the_replicas_gradients(wrap, schedule):
    run(2, train, wrap, schedule)


@pytest.mark.parametrize("wrap, schedule", [(sharded, "zb-h1"), (partly_sharded, "zbv"), (replicated, "zbv")])
def test_wrapped_stages_in_two_processes_have_the_mean_of_the_replicas_gradients(wrap, schedule):
    run(4, train, wrap, schedule)


class Poisoned(nn.Linear):
    """Raises backward in a microbatch whose gradient is not finite."""

    def forward(self, x):
        out = super().forward(x)
        if out.requires_grad:
            out.register_hook(self._check)
        return out

    @staticmethod
    def _check(grad):
        if not grad.isfinite().all():
            raise ValueError("poisoned")


def fail(wrap):
    both = Both(nn.Sequential(*(Poisoned(12, 12) for _ in range(STAGES))), wrap, "1f1b")
    x, y = batches(8)[both.rank]
    try:
        both.pipe.step(x, target=y * float("nan") if both.rank == 1 else y)
    finally:
        assert all(p.grad is None for p in parameters(both.stages))


GATHER, REDUCE = "all_gather_single", "reduce_scatter_single"
if not hasattr(dist, GATHER):  # torch 2.11
    GATHER, REDUCE = "all_gather_into_tensor", "reduce_scatter_tensor"


def counted(schedule):
    """Collectives in a step of sharded stages, and in an eval."""
    both = Both(chain(4), sharded_as_one, schedule)
    both.step()
    counts = []
    for call in (both.step, lambda: both.pipe.eval(torch.ones(4, 12))):
        with (
            mock.patch.object(dist, GATHER, wraps=getattr(dist, GATHER)) as gather,
            mock.patch.object(dist, REDUCE, wraps=getattr(dist, REDUCE)) as reduce,
        ):
            call()
        counts.append((gather.call_count, reduce.call_count))
    return counts


def overlapping():
    with pytest.raises(pe.InvalidArgument, match="give overlap=False"):
        Both(chain(), sharded, "1f1b", overlap=True)


@pytest.mark.parametrize("schedule", ["gpipe", "zb-h1"])
def test_sharded_stages_are_gathered_once_and_reduced_once_in_a_step(schedule):
    assert run(2, counted, schedule) == [[(STAGES, STAGES), (STAGES, 0)]] * 2


@pytest.mark.parametrize("wrap", [sharded, replicated])
def test_a_failure_in_one_replica_ends_the_other_too(wrap):
    ours, theirs = outcomes(2, fail, wrap)
    # Ours ends in its own collective, or hears of it while it waits for the replica.
    assert ours.kind in (pe.StageError, pe.ReductionError) and theirs.kind is pe.StageError
    assert "ValueError: poisoned" in theirs.message


def test_a_sharded_stage_is_not_run_forward_and_backward_at_once():
    run(2, overlapping)
