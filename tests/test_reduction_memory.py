"""Gradients are views of one memory: what writes there unseen, and views that change places."""

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, twin
from replicas import Replicas, batches, reference_replicas
from torch import nn


class FusedProduct(torch.autograd.Function):
    """Adds the weight's gradient to ``.grad`` itself, past its version, as fused kernels do."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        (x,), weight = ctx.saved_tensors, ctx.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        weight.grad.data.add_(grad.t() @ x)
        return grad @ weight.detach(), None


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x):
        return FusedProduct.apply(x, self.weight)


@pytest.mark.parametrize("wire", [None, torch.float64], ids=str)
def test_a_gradient_written_past_its_version_is_reduced(wire):
    model = nn.Sequential(nn.Linear(12, 12), Fused())
    plains = [twin(model), twin(model)]
    with Replicas(model, 2, 3, loss_fn=F.mse_loss, wire=wire) as replicas:
        for _ in range(2):
            parts = batches()
            reference_replicas(plains, parts, 3, F.mse_loss)
            replicas.step(parts)
            for trained, plain in zip(replicas.models, plains):
                assert_same_gradients(trained, gradients(plain))


def swap(a, b):
    a.grad, b.grad = b.grad, a.grad


def move(a, b):
    a.grad, b.grad = b.grad, None


@pytest.mark.parametrize("wire", [None, torch.float64], ids=str)
@pytest.mark.parametrize("stages", [1, 3])  # in one buffer, and in one each
@pytest.mark.parametrize("change", [swap, move])
def test_views_of_gradients_may_change_places(change, stages, wire):
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    plains = [twin(model), twin(model)]
    with Replicas(model, stages, 3, loss_fn=F.mse_loss, wire=wire) as replicas:
        for _ in range(3):
            parts = batches()
            reference_replicas(plains, parts, 3, F.mse_loss)
            replicas.step(parts)
            for trained, plain in zip(replicas.models, plains):
                assert_same_gradients(trained, gradients(plain))
            for m in (*plains, *replicas.models):
                change(m[0].weight, m[2].weight)
