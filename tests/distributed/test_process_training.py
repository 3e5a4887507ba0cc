"""Clipping and scaling of gradients over a pipeline whose ranks are processes."""

import math

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from reference import gradients, reference_step, twin
from torch import nn
from torch.amp import GradScaler
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import pipeline_ext as pe


def batch():
    return torch.randn(8, 12), torch.randn(8, 12)


def pipeline(model, pp, **options):
    mesh = dist.init_device_mesh("cpu", (pp,), mesh_dim_names=("pp",))
    return pe.Pipeline(model, pp, 4, loss_fn=F.mse_loss, mesh=mesh, **options)


def clip(pp):
    """What both say each norm is; checks the gradients here."""
    model = models.chain()
    norms = []
    with pipeline(model, pp) as pipe:
        for norm_type in (2.0, 1.0, math.inf):
            model.zero_grad()
            plain = twin(model)
            x, y = batch()
            reference_step(plain, x, y, 4, F.mse_loss)
            pipe.step(x, target=y)
            norm = pipe.clip_grad_norm_(1e-2, norm_type)
            norms.append((norm.item(), nn.utils.clip_grad_norm_(plain.parameters(), 1e-2, norm_type).item()))
            for name, parameter in pipe.named_parameters():
                torch.testing.assert_close(parameter.grad, gradients(plain)[name])
        if dist.get_rank() == 1:
            next(pipe.parameters()).grad = torch.tensor(math.inf).expand(12, 12).clone()
        with pytest.raises(RuntimeError, match="non-finite"):
            pipe.clip_grad_norm_(1.0, error_if_nonfinite=True)
    return norms


@pytest.mark.parametrize("pp", [2, 4])
def test_the_norm_is_that_of_the_unsplit_model_in_every_process(pp):
    first, *others = run(pp, clip, pp)
    assert others == [first] * (pp - 1)
    for norm, expected in first:
        assert norm == pytest.approx(expected, rel=1e-6)


def scale():
    """Trains as a plain model beside it; returns the scales."""
    model = models.chain()
    plain = twin(model)
    ours = ShardedGradScaler("cpu", init_scale=2.0**10, growth_interval=2, process_group=dist.group.WORLD)
    theirs = GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    with pipeline(model, 2, scaler=ours) as pipe:
        pairs = [
            (pipe, torch.optim.SGD(pipe.parameters(), lr=0.1), ours, pipe.clip_grad_norm_),
            (
                plain,
                torch.optim.SGD(plain.parameters(), lr=0.1),
                theirs,
                lambda most: nn.utils.clip_grad_norm_(plain.parameters(), most),
            ),
        ]
        for number in range(6):
            x, y = batch()
            if number == 3:
                y[0, 0] = math.inf  # of the stages, the last sees it first
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, lambda output, target: theirs.scale(F.mse_loss(output, target)))
            for trained, optimizer, scaler, clip_to in pairs:
                overflows = dict(trained.named_parameters()).get("0.weight") if number == 1 else None
                if overflows is not None:  # in one process alone
                    overflows.grad.fill_(math.inf)
                if number != 1:
                    scaler.unscale_(optimizer)
                    clip_to(0.5)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            scales.append((ours.get_scale(), theirs.get_scale()))
        for name, parameter in pipe.named_parameters():
            torch.testing.assert_close(parameter, plain.get_parameter(name))
    with pytest.raises(pe.InvalidArgument, match="ShardedGradScaler"):
        pipeline(models.chain(), 2, scaler=GradScaler("cpu"))  # which does not ask the others
    return scales


def test_all_processes_scale_alike_and_skip_a_step_together():
    first, second = run(2, scale)
    assert first == second
    assert all(ours == theirs for ours, theirs in first)
    assert [ours for ours, _ in first] == [2.0**10, 2.0**9, 2.0**9, 2.0**8, 2.0**8, 2.0**9]
