"""Replicas of a pipeline whose ranks are processes: the same gradients as in one process, and one end for all."""

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
