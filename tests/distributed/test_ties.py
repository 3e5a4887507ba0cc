"""Parameters that stages in several processes hold."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Failed, Gone, die, outcomes, run
from reference import reference_step
from torch import nn

import pipeline_ext as pe


def tied():
    """First and last layer share a weight, with that of a third in between."""
    layers = [nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Linear(12, 12)]
    layers[5].weight = layers[2].weight = layers[0].weight
    return nn.Sequential(*layers)


def pipeline(model, pp, **options):
    mesh = dist.init_device_mesh("cpu", (pp,), mesh_dim_names=("pp",))
    return pe.Pipeline(model, pp, 4, loss_fn=F.mse_loss, mesh=mesh, **options)


def train(pp, meta):
    """Two steps add up before each update, and one is not cleared to None but to zeros."""
    with torch.device("meta" if meta else "cpu"):
        model = tied()
    plain = tied()
    with pipeline(model, pp) as pipe:
        state = [None] * pp
        dist.all_gather_object(state, dict(pipe.state_dict()))
        plain.load_state_dict({name: value for of_one in state for name, value in of_one.items()})
        ours = torch.optim.AdamW(pipe.parameters(), lr=0.01)
        theirs = torch.optim.AdamW(plain.parameters(), lr=0.01)
        for step in range(6):
            x, y = torch.randn(8, 12), torch.randn(8, 12)
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            for name, parameter in pipe.named_parameters():
                torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)
            if step % 2:
                norm = pipe.clip_grad_norm_(0.1)
                torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 0.1))
                ours.step()
                theirs.step()
                ours.zero_grad(set_to_none=step == 1)
                theirs.zero_grad(set_to_none=step == 1)
        return {name: value.clone() for name, value in pipe.state_dict().items()}


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("pp", [2, 4])
def test_they_begin_equal_train_as_one_and_stay_equal(pp, meta):
    state = {name: value for of_one in run(pp, train, pp, meta) for name, value in of_one.items()}
    assert list(state) == list(tied().state_dict())
    for name in ("2.weight", "5.weight"):
        assert torch.equal(state[name], state["0.weight"])


def frozen():
    model = tied()
    model[0].weight.requires_grad_(False)
    with pipeline(model, 2) as pipe:
        pipe.step(torch.randn(8, 12), target=torch.randn(8, 12))
        return [name for name, parameter in pipe.named_parameters() if parameter.grad is None]


def test_without_a_gradient_anywhere_there_is_none():
    assert run(2, frozen) == [["0.weight"], ["5.weight"]]


class Ends(torch.autograd.Function):
    """The backward of the first stage, with which its process ends or fails."""

    @staticmethod
    def forward(ctx, x, how):
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.how == "dies":
            die()
        raise ValueError("this stage fails")


class EndsAtLast(nn.Linear):
    """Fails in its last backward, when the stages after it have ended theirs."""

    count, how = 0, ""

    def forward(self, x):
        EndsAtLast.count += 1
        y = super().forward(x)
        return Ends.apply(y, self.how) if EndsAtLast.count == 4 else y


def fail_at_the_end(how):
    EndsAtLast.how = how
    model = nn.Sequential(EndsAtLast(12, 12), nn.Linear(12, 12))
    model[1].weight = model[0].weight
    with pipeline(model, 2, timeout=50) as pipe:
        pipe.step(torch.randn(8, 12), target=torch.randn(8, 12))


@pytest.mark.parametrize("how", ["dies", "raises"])
def test_who_waits_for_the_sum_hears_of_a_failure_at_once(how):
    first, second = outcomes(2, fail_at_the_end, how, timeout=30)
    assert isinstance(first, Gone if how == "dies" else Failed), first
    assert isinstance(second, Failed) and issubclass(second.kind, pe.PipelineError), second
    assert how == "dies" or "this stage fails" in second.message
