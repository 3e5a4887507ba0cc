"""Hooks that get a complete gradient run once in a step, after its last microbatch, whatever the schedule."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import gradients, reference_step, twin
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

SCHEDULES = [name for name in pe.schedule_names() if name not in ("dualpipe", "auto", "zb-auto")]


class Block(nn.Module):
    def __init__(self, recomputed):
        super().__init__()
        self.linear, self.recomputed = nn.Linear(8, 8), recomputed

    def forward(self, x):
        return checkpoint(self._run, x, use_reentrant=False) if self.recomputed else self._run(x)

    def _run(self, x):
        return x + self.linear(x).tanh()


def pipeline(model, schedule, **options):
    layout = pe._C.layout_of(schedule)
    stages = 2 if layout == "linear" else 4
    return pe.Pipeline(model, stages, 4, schedule, F.mse_loss, devices=["cpu"] * 2, **options)


def updates_in_hooks(model):
    """Each parameter's own optimizer steps, and frees the gradient, as soon as that is complete."""
    calls = []
    for name, parameter in model.named_parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def hook(_, name=name, optimizer=optimizer):
            calls.append(name)
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(hook)
    return calls


@pytest.mark.filterwarnings("ignore:.*post-accumulate-grad hooks")
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_optimizer_in_a_hook_steps_once_with_the_whole_gradient(schedule, recomputed):
    model = nn.Sequential(*(Block(recomputed) for _ in range(4)))
    x, y, plain = torch.randn(8, 8), torch.randn(8, 8), twin(model)
    calls = updates_in_hooks(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pipeline(model, schedule) as pipe:
        for _ in range(3):
            optimizer.zero_grad()
            reference_step(plain, x, y, 4, F.mse_loss)
            optimizer.step()
            pipe.step(x, target=y)
            assert sorted(calls) == sorted(name for name, _ in model.named_parameters())
            calls.clear()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p, q) and p.grad is None


def test_a_hook_that_expects_a_call_for_each_microbatch_is_warned_of_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
    x = torch.randn(8, 4)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        with pytest.warns(UserWarning, match="1 parameters have.*once, after the last microbatch, not 4 times"):
            pipe.step(x, target=x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.step(x, target=x)


@pytest.mark.filterwarnings("ignore:.*post-accumulate-grad hooks")
def test_a_hook_runs_where_the_step_has_changed_the_gradient_and_survives_a_failure():
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
            self.fails = False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("broken")
            return self.used(x)

    model, calls = nn.Sequential(Chosen(), nn.Linear(4, 4)), []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    model[0].idle.weight.grad = torch.ones(4, 4)
    x = torch.randn(8, 4)
    used = ["0.used.weight", "0.used.bias", "1.weight", "1.bias"]
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=x)
        assert calls == used
        pipe.step(x, target=x)  # into the gradients that are there
        assert calls == used * 2
        model[0].fails = True
        with pytest.raises(pe.StageError):
            pipe.step(x, target=x)
        model[0].fails = False
        assert calls == used * 2
        pipe.step(x, target=x)
        assert calls == used * 3


@pytest.mark.filterwarnings("ignore:.*post-accumulate-grad hooks")
def test_a_tied_parameter_s_hook_gets_the_sum_and_one_that_gets_parts_is_refused():
    class Tied(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, x):
            return x @ self.weight.T

    weight = nn.Parameter(torch.randn(4, 4))
    model, seen = nn.Sequential(Tied(weight), nn.Tanh(), Tied(weight)), []
    x, y, plain = torch.randn(8, 4), torch.randn(8, 4), twin(model)
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    reference_step(plain, x, y, 4, F.mse_loss)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
        (found,) = seen
        torch.testing.assert_close(found, plain[0].weight.grad)
        before = gradients(model)
        weight.register_hook(lambda grad: grad * 2)
        with pytest.raises(
            pe.InvalidArgument, match=r"shape \[4, 4\] has a hook.*several stages.*post_accumulate"
        ):
            pipe.step(x, target=y)
        assert torch.equal(before["0.weight"], weight.grad)
