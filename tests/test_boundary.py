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


def steps(model, number, rows=lambda step: 8, loss_fn=nn.functional.mse_loss, schedule="1f1b"):
    """Runs steps and checks each against the reference."""
    plain = twin(model)
    with pe.Pipeline(
        model, num_stages=2, microbatches=MICROBATCHES, loss_fn=loss_fn, schedule=schedule
    ) as pipe:
        for step in range(number):
            x, y = torch.randn(rows(step), 6), torch.randn(rows(step), 6)
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
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.leaves = []

    def forward(self, x):
        self.leaves.append(x.is_leaf)
        return (self.weight @ x.t().contiguous()).t()


def test_never_where_the_gradient_has_another_layout():
    second = Turned()
    steps(nn.Sequential(nn.Linear(6, 6), second), 3)
    assert not any(second.leaves)


def test_a_layout_that_only_larger_microbatches_have():
    for schedule in ("1f1b", "gpipe"):
        model = nn.Sequential(nn.Linear(6, 6), Turned())
        steps(model, 4, rows=lambda step: 4 if step % 2 == 0 else 10, schedule=schedule)


class Summed(nn.Module):
    """Whose gradient for its input is expanded."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x.sum(1, keepdim=True) + self.weight


def test_an_expanded_gradient():
    steps(nn.Sequential(nn.Linear(6, 6), Summed()), 3)


class Severed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return None


class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return Severed.apply(x) * self.weight


def test_no_gradient_is_none_and_not_zeros():
    model = nn.Sequential(nn.Linear(6, 6), Cut())
    steps(model, 3)
    assert model[0].weight.grad is None


class Biased(nn.Module):
    """A loss that reaches its one-element parameter through a view alone."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.randn(1))

    def forward(self, x):
        return pe.WithLoss(x, self.bias.squeeze()) if self.training else x


def test_a_parameter_that_is_a_loss_itself():
    model = nn.Sequential(nn.Linear(6, 6), Biased())
    with pe.Pipeline(model, num_stages=2, microbatches=MICROBATCHES, loss_fn=nn.functional.mse_loss) as pipe:
        pipe.step(torch.randn(8, 6), target=torch.randn(8, 6))
    assert model[1].bias.grad.item() == 1.0


class Split(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place

    def forward(self, value):
        if isinstance(value, tuple):
            x, y = value
            return (x.mul_(2.0) if self.in_place else x * 2.0) + y.view_as(x)
        return value * 1.0, (value * 1.0).view(-1)


class Same(Split):
    def forward(self, value):
        if isinstance(value, tuple):
            return super().forward(value)
        h = value * 1.0
        return h, h.view(-1)


@pytest.mark.parametrize(
    "first, in_place, refused", [(Split, True, False), (Same, False, False), (Same, True, True)]
)
def test_values_that_share_memory_are_not_changed_in_place(first, in_place, refused):
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), first(False)), Split(in_place))
    with pe.Pipeline(model, cuts=["1"], microbatches=MICROBATCHES, loss_fn=nn.functional.mse_loss) as pipe:
        x, y = torch.randn(8, 6), torch.randn(8, 6)
        if refused:
            with pytest.raises(pe.StageError, match="shares memory with another"):
                pipe.step(x, target=y)
            return
        plain = twin(model)
        pipe.step(x, target=y)
        reference_step(plain, x, y, MICROBATCHES, nn.functional.mse_loss)
        assert_same_gradients(model, gradients(plain))


def test_a_loss_that_works_in_place_for_one_microbatch_costs_one_step():
    calls = []

    def loss_fn(out, target):
        calls.append(out.is_leaf)
        if len(calls) == MICROBATCHES + 2:
            out.nan_to_num_()
        return nn.functional.mse_loss(out, target)

    model = nn.Sequential(nn.Linear(6, 6), nn.Identity())
    with pe.Pipeline(model, num_stages=2, microbatches=MICROBATCHES, loss_fn=loss_fn) as pipe:
        x, y = torch.randn(8, 6), torch.randn(8, 6)
        pipe.step(x, target=y)
        with pytest.raises(pe.StageError, match="leaf"):
            pipe.step(x, target=y)
        before = len(calls)
        pipe.step(x, target=y)
    assert len(calls) == before + MICROBATCHES and not any(calls[before:])


def test_what_eval_returns_requires_no_gradient():
    class Handing(nn.Linear):
        def forward(self, x):
            return super().forward(x), self.bias

    class Taking(nn.Module):
        def forward(self, value):
            return value[1].expand(len(value[0]), -1)

    with pe.Pipeline(
        [Handing(6, 6), Taking()], microbatches=MICROBATCHES, loss_fn=nn.functional.mse_loss
    ) as pipe:
        pipe.step(torch.randn(8, 6), target=torch.randn(8, 6))
        assert not pipe.eval(torch.randn(8, 6)).requires_grad


def test_the_loss_of_one_microbatch_is_not_the_one_in_losses():
    losses = []
    with pe.Pipeline([nn.Linear(6, 6)], microbatches=1, loss_fn=nn.functional.mse_loss) as pipe:
        loss = pipe.step(torch.randn(8, 6), target=torch.randn(8, 6), losses=losses)
    loss.zero_()
    assert losses[0] != 0


def test_a_step_with_nothing_to_train_says_so():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).requires_grad_(False)
    with pe.Pipeline(model, 2, MICROBATCHES, loss_fn=nn.functional.mse_loss) as pipe:
        with pytest.raises(pe.PipelineError, match="found nothing to train"):
            pipe.step(torch.randn(8, 6), target=torch.randn(8, 6))


def test_a_microbatch_alone_that_works_in_place_costs_one_step():
    second = Watched(lambda call: call == MICROBATCHES + 2)
    model = nn.Sequential(nn.Linear(6, 6), second)
    with pe.Pipeline(model, num_stages=2, microbatches=MICROBATCHES, loss_fn=nn.functional.mse_loss) as pipe:
        x, y = torch.randn(8, 6), torch.randn(8, 6)
        pipe.step(x, target=y)
        with pytest.raises(pe.StageError, match="leaf"):
            pipe.step(x, target=y)
        calls = len(second.leaves)
        pipe.step(x, target=y)
        pipe.step(x, target=y)
    assert not any(second.leaves[calls:])
