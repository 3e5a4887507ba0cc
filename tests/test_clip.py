"""clip_grad_norm_ of a pipeline: that of the unsplit model."""

import math
import threading

import models
import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe


def pipeline(model, num_stages=None):
    return pe.Pipeline(model, num_stages, microbatches=4, loss_fn=F.mse_loss)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_it_does_to_all_stages_what_torch_does_to_the_unsplit_model(norm_type, max_norm):
    model = models.chain()
    plain = twin(model)
    x, y = torch.randn(8, 12), torch.randn(8, 12)
    reference_step(plain, x, y, 4, F.mse_loss)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), max_norm, norm_type)
    with pipeline(model, 3) as pipe:
        pipe.step(x, target=y)
        assert torch.equal(pipe.clip_grad_norm_(max_norm, norm_type), expected)
    assert_same_gradients(model, gradients(plain))


def test_a_tied_parameter_counts_once():
    stages = [nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)]
    stages[1].weight = stages[0].weight
    with pipeline(stages) as pipe:
        stages[0].weight.grad = torch.full((4, 4), 2.0)
        assert pipe.clip_grad_norm_(4.0).item() == 8.0
        torch.testing.assert_close(stages[0].weight.grad, torch.ones(4, 4))


def test_parameters_without_gradient_and_a_model_without_any():
    model = models.chain(layers=2)
    with pipeline(model, 2) as pipe:
        assert pipe.clip_grad_norm_(1.0).item() == 0.0
        model[0].weight.grad = torch.ones_like(model[0].weight)
        assert pipe.clip_grad_norm_(1.0).item() == 12.0
        assert model[0].bias.grad is None


def test_a_norm_that_is_not_finite_raises_where_asked_for():
    model = models.chain(layers=2)
    with pipeline(model, 2) as pipe:
        model[0].weight.grad = torch.full_like(model[0].weight, torch.inf)
        assert pipe.clip_grad_norm_(1.0).item() == math.inf
        with pytest.raises(RuntimeError, match="non-finite"):
            pipe.clip_grad_norm_(1.0, error_if_nonfinite=True)


def test_it_is_refused_while_a_step_runs():
    inside, go = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        def forward(self, x):
            inside.set()
            go.wait(10)
            return super().forward(x)

    with pipeline([nn.Linear(4, 4), Waits(4, 4)]) as pipe:
        x = torch.randn(8, 4)
        stepping = threading.Thread(target=lambda: pipe.step(x, target=x))
        stepping.start()
        assert inside.wait(10)
        with pytest.raises(pe.PipelineError, match="clip_grad_norm_ was called while"):
            pipe.clip_grad_norm_(1.0)
        go.set()
        stepping.join()
