"""Clipping and scaling of gradients over a pipeline whose ranks are processes."""

import math

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Failed, outcomes, run
from reference import gradients, reference_step, twin
from torch import nn
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import pipeline_ext as pe


def batches(count):
    return [(torch.randn(8, 12), torch.randn(8, 12)) for _ in range(count)]


def pipeline(model, pp, **options):
    mesh = dist.init_device_mesh("cpu", (pp,), mesh_dim_names=("pp",))
    return pe.Pipeline(model, pp, 4, loss_fn=F.mse_loss, mesh=mesh, **options)


def clip(pp, norm_type):
    """What both say the norm is; checks the gradients here."""
    model = models.chain()
    plain = twin(model)
    x, y = batches(1)[0]
    reference_step(plain, x, y, 4, F.mse_loss)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 1e-2, norm_type)
    with pipeline(model, pp) as pipe:
        pipe.step(x, target=y)
        norm = pipe.clip_grad_norm_(1e-2, norm_type)
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients(plain)[name])
    return norm.item(), expected.item()


@pytest.mark.parametrize("pp", [2, 4])
def test_the_norm_is_that_of_the_unsplit_model_in_every_process(pp):
    for norm_type in (2.0, 1.0, math.inf):
        norms = run(pp, clip, pp, norm_type)
        assert len({norm for norm, _ in norms}) == 1
        norm, expected = norms[0]
        assert norm == pytest.approx(expected, rel=1e-6)


def clip_infinity():
    model = models.chain()
    with pipeline(model, 2) as pipe:
        if dist.get_rank() == 1:
            next(pipe.parameters()).grad = torch.tensor(math.inf).expand(12, 12).clone()
        pipe.clip_grad_norm_(1.0, error_if_nonfinite=True)


def test_a_norm_that_is_not_finite_raises_in_every_process():
    for outcome in outcomes(2, clip_infinity):
        assert isinstance(outcome, Failed) and outcome.kind is RuntimeError, outcome


def scaled(count, overflowing):
    """Trains as a plain model beside it; returns the scales."""
    model = models.chain()
    plain = twin(model)
    ours = ShardedGradScaler(
        "cpu", init_scale=2.0**10, growth_interval=2, process_group=dist.group.WORLD
    )
    theirs = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    with pipeline(model, 2, scaler=ours) as pipe:
        pairs = [
            (torch.optim.SGD(pipe.parameters(), lr=0.1), ours, pipe.clip_grad_norm_),
            (
                torch.optim.SGD(plain.parameters(), lr=0.1),
                theirs,
                lambda most: nn.utils.clip_grad_norm_(plain.parameters(), most),
            ),
        ]
        for number, (x, y) in enumerate(batches(count)):
            if number == overflowing:
                y[0, 0] = math.inf  # of the stages, the last sees it first
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, lambda output, target: theirs.scale(F.mse_loss(output, target)))
            for optimizer, scaler, clip_to in pairs:
                scaler.unscale_(optimizer)
                clip_to(0.5)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            scales.append((ours.get_scale(), theirs.get_scale()))
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter, plain.get_parameter(name))
    return scales


def test_all_processes_scale_alike_and_skip_a_step_together():
    first, second = run(2, scaled, 4, 1)
    assert first == second
    assert all(ours == theirs for ours, theirs in first)
    assert [ours for ours, _ in first] == [2.0**10, 2.0**9, 2.0**9, 2.0**10]


def scale_alone():
    pipeline(models.chain(), 2, scaler=GradScaler("cpu"))


def test_a_scaler_that_does_not_ask_the_others_is_refused():
    for outcome in outcomes(2, scale_alone):
        assert isinstance(outcome, Failed) and outcome.kind is pe.InvalidArgument, outcome
        assert "ShardedGradScaler" in outcome.message
