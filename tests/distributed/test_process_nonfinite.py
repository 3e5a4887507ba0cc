"""Values that are not finite in one of several processes: all of them name it and drop the step."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from reference import gradients, reference_step, twin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import pipeline_ext as pe

WIDTH, MICROBATCHES = 6, 4


class Spoils(nn.Module):
    """A layer that multiplies what goes back, or forward, of one microbatch by a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.count, self.m, self.forward_factor, self.backward_factor = 0, -1, 1.0, 1.0

    def forward(self, x):
        y = self.linear(x)
        self.count, spoiled = self.count + 1, self.count % MICROBATCHES == self.m
        if spoiled:
            y = y * self.forward_factor
            if self.backward_factor != 1:
                y.register_hook(lambda grad: grad * self.backward_factor)
        return y


def step_told(pipe, x, y):
    """What a step said that found something, as an error or a warning; None if it found nothing."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            pipe.step(x, target=y)
        except pe.NonFiniteError as error:
            return str(error)
    return next((str(w.message) for w in told if "finite" in str(w.message)), None)


def drop_and_go_on(schedule, policy):
    torch.manual_seed(3)
    plain = nn.Sequential(Spoils(), Spoils())
    model = twin(plain)
    x, y = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    said = []
    with pe.Pipeline(
        model, 2, MICROBATCHES, schedule, F.mse_loss, mesh=dist.group.WORLD, timeout=30, nonfinite=policy
    ) as pipe:
        local = {p for module in pipe.stage_modules for p in module.parameters()}
        for stage, factors in (
            (0, (math.nan, 1.0)),
            (1, (math.inf, 1.0)),
            (1, (1.0, math.nan)),
            (0, (1.0, math.nan)),
        ):
            layer = model[stage]
            layer.m, (layer.forward_factor, layer.backward_factor) = 2, factors
            said.append(step_told(pipe, x, y))
            assert all(p.grad is None for p in local)
            layer.m = -1
            reference_step(plain, x, y, MICROBATCHES, F.mse_loss)
            assert step_told(pipe, x, y) is None
            expected = gradients(plain)
            assert all(torch.equal(p.grad, expected[n]) for n, p in model.named_parameters() if p in local)
            model.zero_grad()
            plain.zero_grad()
        assert pipe.skipped == (4 if policy == "skip" else 0)
    return said


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_all_processes_tell_the_same_and_go_on(schedule, policy):
    first, second = run(2, drop_and_go_on, schedule, policy)
    begins = [
        "the result of stage 0 for microbatch 2",
        "the loss of microbatch 2",
        "the gradient that stage 1 sends back for microbatch 2",
        "the gradient of ",
    ]
    for one, other, begin in zip(first, second, begins, strict=True):
        assert one.startswith(begin) and other.startswith(begin)
        assert one == other or begin == "the gradient of "  # the name is known where the stage is


def refused_where_a_stage_is_sharded():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "dp"))
    stage = fully_shard(nn.Linear(WIDTH, WIDTH), mesh=mesh["dp"])
    for policy in ("raise", "skip"):
        with pytest.raises(pe.InvalidArgument, match=r"give nonfinite=\"warn\", and pipe.clip_grad_norm_"):
            pe.Pipeline([stage], 1, 2, "gpipe", F.mse_loss, mesh=mesh, nonfinite=policy)
    with pe.Pipeline([stage], 1, 2, "gpipe", F.mse_loss, mesh=mesh, nonfinite="warn", timeout=30) as pipe:
        x = torch.full((4, WIDTH), math.nan)
        assert "not finite" in step_told(pipe, x, torch.zeros(4, WIDTH))
        with pytest.raises(RuntimeError, match="non-finite"):
            pipe.clip_grad_norm_(1.0, error_if_nonfinite=True)


def test_stages_that_several_processes_share_out_are_refused_and_the_advice_works():
    run(2, refused_where_a_stage_is_sharded)
