"""Replicas whose pipelines are of processes: the same gradients as in one process, and one end for all."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import chain
from processes import Failed, Gone, die, freeze, outcomes, run
from reference import gradients, reference_step, twin
from replicas import batches, reference_replicas
from torch import nn

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
        """The gradients of the stages here are the plain model's; a sum of two has no order, so bit for bit."""
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
