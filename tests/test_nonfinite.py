"""Steps with a loss or a gradient that is not finite: found, named, and dropped in all ranks and replicas."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_orders import NAMED
from reference import assert_same_gradients, gradients, reference_step
from replicas import Replicas, batches
from torch import nn

import pipeline_ext as pe

STAGES, MICROBATCHES, WIDTH = 4, 4, 6
SEVERAL = [name for name in NAMED if "v" in name or "interleaved" in name or "looped" in name]


class Spoils(torch.autograd.Function):
    """Adds a number to what comes through, forward or backward."""

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.back = back
        return x + there

    @staticmethod
    def backward(ctx, grad):
        return grad + ctx.back, None, None


class Layer(nn.Module):
    """A stage that is told which microbatch to spoil, by the number in its first element."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.spoils = None  # (microbatch, what to add forward, what to add backward)

    def forward(self, x):
        m = int(x.detach()[0, 0])
        there, back = self.spoils[1:] if self.spoils and self.spoils[0] == m else (0.0, 0.0)
        y = Spoils.apply(torch.tanh(self.linear(x)), there, back)
        return torch.cat([x[:, :1], y[:, 1:]], dim=1)  # hands the number on


def model_and_batch():
    model = nn.Sequential(*(Layer() for _ in range(STAGES)))
    x = torch.randn(2 * MICROBATCHES, WIDTH)
    x[:, 0] = torch.arange(MICROBATCHES).repeat_interleave(2)
    return model, x, torch.randn(2 * MICROBATCHES, WIDTH)


def ranks_for(schedule):
    return STAGES // 2 if schedule in SEVERAL else STAGES


def pipeline(model, schedule="1f1b", **options):
    devices = ["cpu"] * ranks_for(schedule)
    return pe.Pipeline(
        model, STAGES, MICROBATCHES, schedule, F.mse_loss, devices=devices, trace=False, **options
    )


def check_next_step(pipe, model, x, y):
    for layer in model:
        layer.spoils = None
    model.zero_grad()
    plain = copy.deepcopy(model)
    expected = reference_step(plain, x, y, MICROBATCHES, F.mse_loss)
    assert pipe.step(x, target=y).item() == expected.item()
    assert_same_gradients(model, gradients(plain))


@settings(max_examples=25, deadline=None)
@given(
    stage=st.integers(0, STAGES - 1),
    m=st.integers(0, MICROBATCHES - 1),
    forward=st.booleans(),
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    schedule=st.sampled_from(NAMED),
    policy=st.sampled_from(["raise", "skip"]),
)
def test_the_stage_and_the_microbatch_are_named_and_the_gradients_dropped(
    stage, m, forward, value, schedule, policy
):
    model, x, y = model_and_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    with pipeline(model, schedule, nonfinite=policy) as pipe:
        check_next_step(pipe, model, x, y)
        optimizer.step()
        optimizer.zero_grad()
        model[stage].spoils = (m, value, 0.0) if forward else (m, 0.0, value)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if forward:
            what = f"result of stage {stage} for" if stage < STAGES - 1 else "loss of"
            told = f"^the {what} microbatch {m} is not finite"
        elif stage > 0:
            told = f"^the gradient that stage {stage} sends back for microbatch {m} is not finite"
        else:  # of the first stage only the parameters' gradients show it
            told = "^the gradient of 0.linear.weight of stage 0 is not finite"
        if policy == "raise":
            with pytest.raises(pe.NonFiniteError, match=told) as caught:
                pipe.step(x, target=y)
            assert caught.value.stage == stage
            assert caught.value.microbatch == (m if forward or stage else None)
        else:
            with pytest.warns(UserWarning, match=told):
                loss = pipe.step(x, target=y)
            assert loss.isfinite() == (not forward)
            assert pipe.skipped == 1
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()  # leaves the step out
        torch.testing.assert_close((model.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0)
        check_next_step(pipe, model, x, y)


def test_a_warning_alone_leaves_the_gradients():
    model, x, y = model_and_batch()
    model[1].spoils = (2, math.nan, 0.0)
    with pipeline(model, nonfinite="warn") as pipe:
        for _ in range(2):  # of each step
            with pytest.warns(UserWarning, match="^the result of stage 1 for microbatch 2 is not finite"):
                pipe.step(x, target=y)
        assert all(p.grad is not None for p in model.parameters())
        assert pipe.skipped == 0


def test_without_a_policy_a_loss_is_told_once_and_the_advice_finds_the_stage():
    model, x, y = model_and_batch()
    model[1].spoils = (2, math.nan, 0.0)
    with pipeline(model) as pipe:
        with pytest.warns(UserWarning, match='^the loss of microbatch 2 is not finite.*nonfinite="raise"'):
            pipe.step(x, target=y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.step(x, target=y)
    with pipeline(model, nonfinite="raise") as pipe, pytest.raises(pe.NonFiniteError, match="stage 1"):
        pipe.step(x, target=y)


@pytest.mark.parametrize("wrong", ["input", "parameter"])
def test_what_a_stage_was_given_is_named(wrong):
    model, x, y = model_and_batch()
    if wrong == "input":
        x[3, 1] = math.inf
        told = r"the result of stage 0 for microbatch 1 \(as its input is already\)"
        x = torch.where(x.isinf(), torch.tensor(math.nan), x)
    else:
        with torch.no_grad():
            model[2].linear.bias[3] = math.nan
        told = r"the result of stage 2 for microbatch 0 \(as its parameter 2.linear.bias is already\)"
    with pipeline(model, nonfinite="raise") as pipe, pytest.raises(pe.NonFiniteError, match=told):
        pipe.step(x, target=y)


class Masks(nn.Module):
    """Hands on scores of which some are -inf, as attention masks make them."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x).masked_fill(torch.arange(WIDTH) > 3, -math.inf)


def test_infinite_values_between_stages_are_fine_where_loss_and_gradients_are_finite():
    model = nn.Sequential(Masks(), nn.Softmax(dim=1), nn.Linear(WIDTH, WIDTH))
    x, y = torch.randn(8, WIDTH), torch.randn(8, WIDTH)
    plain = copy.deepcopy(model)
    with pe.Pipeline(model, 3, 4, loss_fn=F.mse_loss, nonfinite="raise") as pipe:
        assert pipe.step(x, target=y).item() == reference_step(plain, x, y, 4, F.mse_loss).item()
        assert_same_gradients(model, gradients(plain))


def test_a_loss_that_does_not_count_may_be_nan():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))
    x, y = torch.randn(8, WIDTH), torch.randint(3, (8,))
    y[:2] = -100
    options = {"loss_fn": F.cross_entropy, "loss_weight": pe.count_not(-100)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for policy in (None, "raise"):
            with pe.Pipeline(model, 2, 4, nonfinite=policy, **options) as pipe:
                assert pipe.step(x, target=y).isfinite()


def test_a_sum_that_overflows_is_no_value_that_is_not_finite():
    class Large(nn.Module):
        def forward(self, x):
            return x * 1e38

    class Small(nn.Module):
        def forward(self, x):
            return x / 1e38

    model = nn.Sequential(Large(), nn.Sequential(Small(), nn.Linear(WIDTH, WIDTH)))
    x = torch.ones(8, WIDTH, requires_grad=True)
    with pe.Pipeline(model, 2, 4, loss_fn=lambda out: out.square().mean(), nonfinite="raise") as pipe:
        pipe.step(x)
    assert x.grad.isfinite().all()


def test_inputs_that_require_a_gradient_are_refused_where_a_step_may_be_skipped_and_the_advice_works():
    model, x, y = model_and_batch()
    before = nn.Parameter(torch.ones(WIDTH))
    model[2].spoils = (1, 0.0, math.nan)
    with pipeline(model, nonfinite="skip") as pipe:
        with pytest.raises(pe.InvalidArgument, match='give nonfinite="raise", and set those gradients to None'):
            pipe.step(x * before, target=y)
        assert before.grad is None
    with pipeline(model, nonfinite="raise") as pipe:
        with pytest.raises(pe.NonFiniteError, match="stage 2"):
            pipe.step(x * before, target=y)
        before.grad = None
        model[2].spoils = None
        pipe.step(x * before, target=y)
        assert before.grad.isfinite().all()


def test_an_optimizer_of_the_pipelines_and_hooks_leave_a_dropped_step_out():
    model, x, y = model_and_batch()
    called = []
    model[0].linear.weight.register_post_accumulate_grad_hook(lambda p: called.append(p.grad is not None))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pipeline(model, nonfinite="skip", optimizer=optimizer) as pipe:
        weights = copy.deepcopy(model.state_dict())
        model[3].spoils = (0, math.inf, 0.0)
        with pytest.warns(UserWarning, match="loss of microbatch 0"):
            pipe.step(x, target=y)
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
        assert not called
        model[3].spoils = None
        pipe.step(x, target=y)
        assert called == [True]
        assert not torch.equal(model[0].linear.weight, weights["0.linear.weight"])


@pytest.mark.parametrize("policy", [None, "warn", "raise"])
def test_a_scaler_leaves_steps_out_that_overflow(policy):
    model, x, y = model_and_batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with pipeline(model, nonfinite=policy, scaler=scaler) as pipe:
        weights = copy.deepcopy(model.state_dict())
        model[1].spoils = (2, 0.0, math.inf)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.step(x, target=y)
        scaler.step(optimizer)
        scaler.update()
        torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
        assert scaler.get_scale() == 512


def test_refused():
    model, _, _ = model_and_batch()
    for options, told in (
        ({"nonfinite": "stop"}, 'nonfinite is \'stop\'; it is "raise", "warn", "skip" or None'),
        ({"nonfinite": "raise", "graphs": True}, "nonfinite='raise' and graphs=True do not go together"),
        ({"nonfinite": "skip", "scaler": torch.amp.GradScaler("cpu")}, "scaler.step leaves out such steps"),
    ):
        with pytest.raises(pe.InvalidArgument) as caught:
            pipeline(model, **options)
        assert told in str(caught.value)


def test_the_error_survives_a_pickle():
    error = pe.NonFiniteError("text", stage=3, microbatch=None)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.stage, again.microbatch) == ("text", 3, None)
    assert isinstance(again, FloatingPointError)


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("forward", [True, False])
def test_all_replicas_drop_the_same_step_and_go_on(policy, forward):
    model = nn.Sequential(*(Layer() for _ in range(2)))
    given = batches(rows=4, width=WIDTH)
    for x, _ in given:
        x[:, 0] = torch.arange(2).repeat_interleave(2)
    with Replicas(model, 2, 2, loss_fn=F.mse_loss, nonfinite=policy) as replicas:
        replicas.models[1][0].spoils = (1, math.nan, 0.0) if forward else (1, 0.0, math.nan)
        kinds = {type(error) for error in replicas.failures(given)}
        assert kinds == {pe.NonFiniteError if policy == "raise" else type(None)}
        for of_replica in replicas.models:
            assert all(p.grad is None for p in of_replica.parameters())
            of_replica[0].spoils = None
        replicas.step(given)
        first, second = ([p.grad for p in m.parameters()] for m in replicas.models)
        assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second))


def test_replicas_agree_where_only_a_loss_is_not_finite():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    given = batches(rows=4, width=WIDTH)

    def loss_fn(out, target):
        return F.mse_loss(out, target[0]) + target[1].mean()

    def batch(of_second):
        return [(x, (y, torch.full((4,), of_second if r else 0.0))) for r, (x, y) in enumerate(given)]

    with Replicas(model, 2, 2, loss_fn=loss_fn, nonfinite="skip") as replicas:
        for of_second in (math.inf, 0.0):
            replicas.step(batch(of_second))
            assert [pipe.skipped for pipe in replicas.pipes] == [1, 1]
