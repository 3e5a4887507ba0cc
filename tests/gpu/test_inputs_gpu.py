"""Batches in the host's memory: when the caller may change them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import GRAPHS, LANES, SINGLE
from models import Residual
from reference import gradients, reference_step
from torch import nn

import pipeline_ext as pe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

TWO = {"devices": ["cuda:0", "cuda:1"] * 2}
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
MODES = pytest.mark.parametrize(
    "mode",
    [SINGLE, LANES, GRAPHS, pytest.param(TWO, marks=needs_two)],
    ids=["single stream", "lanes", "graphs", "two GPUs"],
)
STEPS = 5  # a graph is captured in the third
BEHIND = 400_000_000  # cycles that the GPU waits before a step


def pipeline(mode, **options):
    model = nn.Sequential(*(Residual(64) for _ in range(4)))
    plain = copy.deepcopy(model)
    return pe.Pipeline(model, 4, 8, loss_fn=F.mse_loss, trace=False, **{**mode, **options}), model, plain


@MODES
def test_a_pinned_batch_may_be_refilled_as_soon_as_step_returns(mode):
    pipe, model, plain = pipeline(mode)
    x, y = torch.empty(32, 64).pin_memory(), torch.empty(32, 64).pin_memory()
    with pipe:
        for _ in range(STEPS):
            x.normal_()
            y.normal_()
            plain.zero_grad()
            expected = reference_step(plain, x.clone(), y.clone(), 8, F.mse_loss)
            model.zero_grad()
            for device in set(pipe.devices):
                with torch.cuda.device(device):
                    torch.cuda._sleep(BEHIND)
            loss = pipe.step(x, target=y)
            x.fill_(float("nan"))
            y.fill_(float("nan"))
            assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
            for name, grad in gradients(model).items():
                torch.testing.assert_close(grad.cpu(), gradients(plain)[name], rtol=1e-4, atol=1e-6)


@MODES
def test_a_pinned_batch_may_be_refilled_as_soon_as_eval_returns(mode):
    pipe, _, plain = pipeline(mode)
    x = torch.empty(32, 64).pin_memory()
    with pipe:
        for _ in range(3):
            x.normal_()
            expected = plain(x.clone())
            torch.cuda._sleep(BEHIND)
            found = pipe.eval(x)
            x.fill_(float("nan"))
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [LANES, GRAPHS], ids=["lanes", "graphs"])
def test_with_non_blocking_a_step_returns_before_the_gpu_has_read_its_batch(mode):
    pipe, model, _ = pipeline(mode, non_blocking=True)
    x, y = torch.ones(32, 64).pin_memory(), torch.ones(32, 64).pin_memory()

    def returns_before_the_gpu_begins(wait):
        begun = torch.cuda.Event()
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda._sleep(wait)
        begun.record()
        loss = pipe.step(x, target=y)
        returned_first = not begun.query()
        torch.cuda.synchronize()
        x.fill_(2.0)
        assert loss.isfinite()
        return returned_first

    with pipe:
        for _ in range(STEPS):
            # A step that waits for the GPU does so however long that takes; a slow host needs a long wait.
            assert any(returns_before_the_gpu_begins(BEHIND << doubled) for doubled in range(6))
