"""Where autograd begins in a stage: at a leaf, unless its code needs otherwise."""

import pytest
import torch
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe

MICROBATCHES = 4


class Watched(nn.Module):
    """Notes whether each forward was given a leaf; adds to its input, in place where `in_place` says so."""

    def __init__(self, in_place):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.in_place = in_place
        self.leaves = []

    def forward(self, x):
        self.leaves.append(x.is_leaf)
        x = x.add_(1.0) if self.in_place(len(self.leaves) - 1) else x + 1.0
        return self.linear(x)


def steps(model, number, before=lambda step: None, loss_fn=nn.functional.mse_loss):
    """Runs steps and checks each against the reference."""
    plain = twin(model)
    with pe.Pipeline(model, num_stages=2, microbatches=MICROBATCHES, loss_fn=loss_fn) as pipe:
        for step in range(number):
            before(step)
            x, y = torch.randn(8, 6), torch.randn(8, 6)
            model.zero_grad()
            plain.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, MICROBATCHES, loss_fn)
            assert_same_gradients(model, gradients(plain))


def test_leaves_but_for_the_first_microbatch_of_a_step():
    second = Watched(lambda call: False)
    steps(nn.Sequential(nn.Linear(6, 6), second), 3)
    assert second.leaves == [False, True, True, True] * 3


def test_never_where_the_stage_works_in_place():
    second = Watched(lambda call: True)
    steps(nn.Sequential(nn.Linear(6, 6), second), 3)
    assert not any(second.leaves)


def test_a_stage_that_begins_to_work_in_place():
    second = Watched(lambda call: call >= 2 * MICROBATCHES)
    steps(nn.Sequential(nn.Linear(6, 6), second), 4)
    assert second.leaves == [False, True, True, True] * 2 + [False] * 8


class Turned(nn.Module):
    """Whose gradient for its input has another memory layout than the input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))
        self.leaves = []

    def forward(self, x):
        self.leaves.append(x.is_leaf)
        return (x.t().contiguous() @ self.weight).t()


def test_never_where_the_gradient_has_another_layout():
    second = Turned()
    steps(nn.Sequential(nn.Linear(6, 6), second), 3)
    assert not any(second.leaves)


def test_a_microbatch_alone_that_works_in_place_costs_one_step():
    second = Watched(lambda call: call == MICROBATCHES + 2)
    model = nn.Sequential(nn.Linear(6, 6), second)
    with pe.Pipeline(
        model, num_stages=2, microbatches=MICROBATCHES, loss_fn=nn.functional.mse_loss
    ) as pipe:
        x, y = torch.randn(8, 6), torch.randn(8, 6)
        pipe.step(x, target=y)
        with pytest.raises(pe.StageError, match="leaf"):
            pipe.step(x, target=y)
        calls = len(second.leaves)
        pipe.step(x, target=y)
        pipe.step(x, target=y)
    assert not any(second.leaves[calls:])
