"""Replicas of a pipeline whose ranks are processes: the same gradients as in one process, and one end for all."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Residual, chain
from processes import Failed, Gone, die, freeze, outcomes, run
from reference import gradients, reference_step, twin
from replicas import average, batches, reference_replicas
from torch import nn
from torch.distributed.tensor import DTensor

import pipeline_ext as pe

MICROBATCHES = 4


class Replica:
    """This process's part of two replicas of ``model``, and plain models for all of it."""

    def __init__(self, model, pp, schedule="1f1b", timeout=30):
        mesh = dist.init_device_mesh("cpu", (2, pp), mesh_dim_names=("dp", "pp"))
        self.number = mesh["dp"].get_local_rank()
        self.model = twin(model)
        self.plains = [twin(model), twin(model)]
        stages = 2 * pp if schedule in ("interleaved-1f1b", "zbv") else pp
        self.pipe = pe.Pipeline(
            self.model, stages, MICROBATCHES, schedule, F.mse_loss, mesh=mesh, timeout=timeout
        )
        self.local = {p for module in self.pipe.stage_modules for p in module.parameters()}

    def step(self, pairs):
        x, y = pairs[self.number]
        return self.pipe.step(x, target=y)

    def check(self):
        """The gradients of the stages here are the plain model's; the sum of two has no order, so to the bit."""
        expected = gradients(self.plains[self.number])
        for name, p in self.model.named_parameters():
            if p in self.local:
                same = p.grad is expected[name] is None or torch.equal(p.grad, expected[name])
                assert same, f"{name} differs from the reference"
            else:
                assert p.grad is None

    def zero_grad(self):
        for model in (self.model, *self.plains):
            model.zero_grad()


def train(pp, schedule):
    replica = Replica(chain(), pp, schedule)
    for _ in range(2):
        pairs = batches()
        loss = replica.step(pairs)
        reference_replicas(replica.plains, pairs, MICROBATCHES, F.mse_loss)
        replica.check()
    replica.zero_grad()
    pairs = batches()
    with replica.pipe.no_sync():
        replica.step(pairs)
    for plain, (x, y) in zip(replica.plains, pairs):
        reference_step(plain, x, y, MICROBATCHES, F.mse_loss)
    replica.check()
    pairs = batches()
    replica.step(pairs)
    reference_replicas(replica.plains, pairs, MICROBATCHES, F.mse_loss)
    replica.check()
    replica.pipe.close()
    return loss.item()


@pytest.mark.parametrize("pp, schedule", [(1, "1f1b"), (2, "gpipe"), (2, "interleaved-1f1b"), (2, "zbv")])
def test_gradients_are_the_mean_over_replicas_step_by_step_and_after_no_sync(pp, schedule):
    losses = run(2 * pp, train, pp, schedule)
    assert losses[:pp] == [losses[0]] * pp and losses[pp:] == [losses[pp]] * pp
    assert losses[0] != losses[pp]


def train_sharded(pp, schedule):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2, pp), mesh_dim_names=("dp", "pp"))
    number = mesh["dp"].get_local_rank()
    stages = 2 * pp if schedule == "zbv" else pp
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(12, 12), Residual(12)) for _ in range(stages)))
    model = twin(plain)
    for stage in model:
        fully_shard(stage[1], mesh=mesh["dp"])
    fully_shard(model[-1], mesh=mesh["dp"])  # the others' first layers are replicated
    pipe = pe.Pipeline(list(model), None, MICROBATCHES, schedule, F.mse_loss, mesh=mesh, timeout=30)
    local = {p for module in pipe.stage_modules for p in module.parameters()}
    optimizers = [torch.optim.SGD(parameters, lr=0.1) for parameters in (local, plain.parameters())]
    plains = [plain, twin(plain)]
    for syncs in (True, False, True):
        pairs = batches()
        x, y = pairs[number]
        with contextlib.nullcontext() if syncs else pipe.no_sync():
            pipe.step(x, target=y)
        for of_replica, pair in zip(plains, pairs):
            reference_step(of_replica, *pair, MICROBATCHES, F.mse_loss)
        found = pipe.eval(x)
        if found is not None:
            torch.testing.assert_close(found, plain(x))
        if not syncs:
            continue
        average(plains)
        for p, q in zip(model.parameters(), plain.parameters()):
            if p in local:
                whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                torch.testing.assert_close(whole, q.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        plains[1] = twin(plain)
    pipe.close()


@pytest.mark.parametrize("pp, schedule", [(1, "1f1b"), (2, "1f1b"), (2, "zbv")])
def test_fully_sharded_stages_are_reduced_once_in_a_step(pp, schedule):
    run(2 * pp, train_sharded, pp, schedule)


class Optional(nn.Module):
    """Uses one of its layers for rows that sum to more than nothing only, and another never."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x):
        x, used = self.always(x.abs()), bool(x.sum() > 0)
        return self.sometimes(x) if used else x


def train_in_part():
    replica = Replica(nn.Sequential(Optional()), 1)
    (x, y), (z, w) = batches()
    pairs = [(x.abs(), y), (-z.abs(), w)]
    replica.step(pairs)
    reference_replicas(replica.plains, pairs, MICROBATCHES, F.mse_loss)
    replica.check()
    replica.pipe.close()


def test_a_parameter_that_one_replica_uses_has_a_gradient_in_all_and_one_that_none_uses_has_none():
    run(2, train_in_part)


class Faulty(nn.Module):
    """Does ``fault`` in the forward of the microbatch that holds a NaN."""

    def __init__(self, fault):
        super().__init__()
        self.inner, self.fault = nn.Linear(12, 12), fault

    def forward(self, x):
        if x.isnan().any():
            self.fault()
        return self.inner(x)


def complain():
    raise ValueError("poisoned")


def fail_in_the_last(pp, fault):
    """In the last replica's last stage."""
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.ReLU(), Faulty(fault))
    replica = Replica(model, pp, timeout=4)
    pairs = batches()
    replica.step(pairs)
    pairs[1][0][-1] = float("nan")
    replica.step(pairs)


@pytest.mark.parametrize("fault", [complain, die, freeze])
@pytest.mark.parametrize("pp", [1, 2])
def test_what_ends_one_process_ends_all_with_an_error_that_names_it(pp, fault):
    *others, last = outcomes(2 * pp, fail_in_the_last, pp, fault)
    if fault is complain:
        assert last.kind is pe.StageError
    else:
        assert isinstance(last, Gone)
    for outcome in others:
        assert isinstance(outcome, Failed) and issubclass(outcome.kind, pe.PipelineError), outcome
        assert f"process {2 * pp - 1}" in outcome.message
