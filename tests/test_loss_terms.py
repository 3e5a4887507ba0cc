"""Terms of the loss that other stages compute or hold: right, or refused with advice that works."""

import random
import time

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zbv", "looped-bfs")


def pipeline(model, schedule, loss_fn, microbatches=4, **options):
    linear = schedule in ("gpipe", "1f1b", "zb-h1", "zb-h2")
    stages, devices = (2, None) if linear else (4, ["cpu"] * 2)
    return pe.Pipeline(model, stages, microbatches, schedule, loss_fn, devices=devices, timeout=20, **options)


class Block(nn.Module):
    def __init__(self, width=8, recomputed=False):
        super().__init__()
        self.linear, self.recomputed = nn.Linear(width, width), recomputed

    def forward(self, x):
        return checkpoint(self._run, x, use_reentrant=False) if self.recomputed else self._run(x)

    def _run(self, x):
        return x + self.linear(x).tanh()


class Expert(nn.Module):
    """Leaves its balancing loss in an attribute."""

    def __init__(self, width=8):
        super().__init__()
        self.router, self.mix = nn.Linear(width, 4), nn.Linear(width, width)
        self.aux_loss = None

    def forward(self, x):
        shares = self.router(x).softmax(-1)
        self.aux_loss = (shares.mean(0) ** 2).sum()
        return x + self.mix(x) * shares[:, :1]


def of_experts(module):
    found = [m.aux_loss for m in module.modules() if isinstance(m, Expert)]
    return 0.1 * sum(found, torch.zeros(()))


def experts():
    return nn.Sequential(
        nn.Linear(4, 8), Expert(), nn.Linear(8, 8), Expert(), nn.Linear(8, 8), Expert(), nn.Linear(8, 2)
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [4, 1])
def test_a_loss_kept_in_an_attribute_is_refused_in_loss_fn_and_right_as_stage_loss(schedule, microbatches):
    model, x, y = experts(), torch.randn(8, 4), torch.randn(8, 2)
    plain = twin(model)
    with pipeline(model, schedule, lambda out, t: F.mse_loss(out, t) + of_experts(model), microbatches) as pipe:
        for _ in range(2):
            with pytest.raises(pe.StageError, match=r"router\.\w+, a parameter of stage \d.*stage_loss="):
                pipe.step(x, target=y)
            assert all(p.grad is None for p in model.parameters())
    loss = reference_step(plain, x, y, microbatches, lambda out, t: F.mse_loss(out, t) + of_experts(plain))
    with pipeline(model, schedule, F.mse_loss, microbatches, stage_loss=of_experts) as pipe:
        torch.testing.assert_close(pipe.step(x, target=y), loss)
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad)
        assert pipe.verify(x, target=y).worst_microbatched < 1e-5


def test_a_loss_of_the_last_stage_s_own_layers_may_be_kept_in_an_attribute():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), Expert(), nn.Linear(8, 2))
    x, y, plain = torch.randn(8, 4), torch.randn(8, 2), twin(model)
    reference_step(plain, x, y, 4, lambda out, t: F.mse_loss(out, t) + of_experts(plain))
    with pe.Pipeline(
        model, cuts=[2], microbatches=4, loss_fn=lambda o, t: F.mse_loss(o, t) + of_experts(model)
    ) as pipe:
        pipe.step(x, target=y)
    assert_same_gradients(model, gradients(plain))


class Activity(nn.Module):
    """Keeps a penalty on what it was given, which depends on no parameter of its own."""

    def forward(self, x):
        self.penalty = x.square().mean()
        return x.tanh()


def test_a_penalty_on_what_another_stage_received_is_refused():
    stages = [nn.Linear(4, 8), Activity(), nn.Linear(8, 2)]
    with pe.Pipeline(stages, microbatches=2, loss_fn=lambda o, t: F.mse_loss(o, t) + stages[1].penalty) as pipe:
        with pytest.raises(pe.StageError, match="computed for another microbatch, or in another stage"):
            pipe.step(torch.randn(4, 4), target=torch.randn(4, 2))


def test_a_stage_that_reads_what_another_keeps_is_refused():
    class Reads(nn.Module):
        def __init__(self, other):
            super().__init__()
            self.__dict__["other"] = other
            self.linear = nn.Linear(8, 2)

        def forward(self, x):
            return self.linear(x) * self.other.weight.sum()

    first = nn.Linear(4, 8)
    with pe.Pipeline([first, Reads(first)], microbatches=2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(
            pe.StageError, match=r"the result of stage 1 depends on weight, a parameter of stage 0"
        ):
            pipe.step(torch.randn(4, 4), target=torch.randn(4, 2))


# -- penalties on weights


def penalty(parameters):
    return 1e-2 * sum(p.square().sum() for p in parameters)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_penalty_on_all_weights_has_its_gradient_once_and_the_same_in_every_step(schedule, recomputed):
    model = nn.Sequential(*(Block(recomputed=recomputed) for _ in range(6)))
    x, y, plain = torch.randn(16, 8), torch.randn(16, 8), twin(model)
    loss = reference_step(plain, x, y, 8, lambda out, t: F.mse_loss(out, t) + penalty(plain.parameters()))
    found = []
    with pipeline(model, schedule, lambda o, t: F.mse_loss(o, t) + penalty(model.parameters()), 8) as pipe:
        for _ in range(3):
            model.zero_grad()
            torch.testing.assert_close(pipe.step(x, target=y), loss)
            found.append(gradients(model))
    for of_step in found:
        for name, q in plain.named_parameters():
            torch.testing.assert_close(of_step[name], q.grad)
            assert torch.equal(of_step[name], found[0][name])


def test_a_penalty_on_parameters_that_were_listed_before_is_refused_and_the_advice_works():
    model = nn.Sequential(*(Block() for _ in range(4)))
    listed = list(model.parameters())
    x, y, plain = torch.randn(8, 8), torch.randn(8, 8), twin(model)
    reference_step(plain, x, y, 4, lambda out, t: F.mse_loss(out, t) + penalty(plain.parameters()))
    with pe.Pipeline(model, 2, 4, loss_fn=lambda o, t: F.mse_loss(o, t) + penalty(listed)) as pipe:
        with pytest.raises(pe.StageError, match=r"\d\.linear\.\w+, a parameter of stage 0.*stage_loss="):
            pipe.step(x, target=y)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, stage_loss=lambda m: penalty(m.parameters())) as pipe:
        pipe.step(x, target=y)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


class Head(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.weight = table.weight

    def forward(self, h):
        return h @ self.weight.T


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_a_tied_weight_counts_once_in_a_penalty(schedule):
    table = nn.Embedding(11, 8)
    model = nn.Sequential(table, Block(), Block(), Head(table))
    ids, y = torch.randint(11, (8, 3)), torch.randint(11, (8, 3))

    def loss_of(m):
        return lambda out, t: F.cross_entropy(out.flatten(0, 1), t.flatten()) + penalty(m.parameters())

    plain = twin(model)
    loss = reference_step(plain, ids, y, 4, loss_of(plain))
    with pe.Pipeline(model, 2, 4, schedule, loss_fn=loss_of(model)) as pipe:
        for _ in range(3):
            model.zero_grad()
            torch.testing.assert_close(pipe.step(ids, target=y), loss)
            for p, q in zip(model.parameters(), plain.parameters()):
                torch.testing.assert_close(p.grad, q.grad)


def test_copies_of_a_model_whose_loss_sees_it_are_plain():
    import copy
    import io

    model = nn.Sequential(*(Block() for _ in range(4)))
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    with pe.Pipeline(model, 2, 4, loss_fn=lambda o, t: F.mse_loss(o, t) + penalty(model.parameters())) as pipe:
        pipe.step(x, target=y)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
            assert all(type(m._parameters) is dict for m in other.modules())
            assert torch.equal(other(x), model(x))


# -- derivatives in the loss


class Energy(nn.Module):
    def __init__(self, pairs):
        super().__init__()
        self.inner, self.outer, self.pairs = nn.Linear(3, 8), nn.Linear(8, 1), pairs

    def forward(self, given):
        if not self.pairs:
            return {"energy": self.outer(self.inner(given).tanh()).sum(), "position": given}
        return {
            "energy": self.outer(given["h"]).sum() + given["position"].square().sum(),
            "position": given["position"],
        }


class Bent(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 8)

    def forward(self, position):
        return {"h": self.linear(position).tanh(), "position": position}


def forces(out, target):
    (found,) = torch.autograd.grad(out["energy"], out["position"], create_graph=True)
    return F.mse_loss(-found, target)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_a_derivative_by_a_model_s_input_is_refused_across_a_cut(schedule):
    with pe.Pipeline([Bent(), Energy(True)], microbatches=2, schedule=schedule, loss_fn=forces) as pipe:
        with pytest.raises(pe.StageError, match="takes a derivative.*would lack terms.*cut the model so that"):
            pipe.step(torch.randn(8, 3, requires_grad=True), target=torch.randn(8, 3))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1"])
def test_a_derivative_within_the_last_stage_is_right(schedule):
    stages = nn.ModuleList([nn.Linear(3, 3), Energy(False)])
    x, y, plain = torch.randn(8, 3), torch.randn(8, 3), twin(stages)
    reference_step(nn.Sequential(*plain), x, y, 2, forces)
    with pe.Pipeline(list(stages), microbatches=2, schedule=schedule, loss_fn=forces) as pipe:
        pipe.step(x, target=y)
    assert_same_gradients(stages, gradients(plain))


# -- nothing races for ``.grad``


class Dawdling(Block):
    def _run(self, x):
        time.sleep(random.choice((0, 0, 0, 2e-5, 2e-4)))
        return super()._run(x)


@pytest.mark.parametrize("count", [25, pytest.param(250, marks=pytest.mark.every)])
def test_no_step_is_wrong_whatever_the_threads_do(count):
    """Short steps of every schedule, with unsplit stages and a penalty on all weights: 2,000 with --all."""
    model = nn.Sequential(*(Dawdling(recomputed=i % 2 == 0) for i in range(8)))
    x, y, plain = torch.randn(16, 8), torch.randn(16, 8), twin(model)
    reference_step(plain, x, y, 8, lambda out, t: F.mse_loss(out, t) + penalty(plain.parameters()))
    for schedule in (*SCHEDULES, "zb-h2", "zbv"):
        first = None
        with pipeline(model, schedule, lambda o, t: F.mse_loss(o, t) + penalty(model.parameters()), 8) as pipe:
            for _ in range(count):
                model.zero_grad()
                pipe.step(x, target=y)
                found = gradients(model)
                first = first or found
                for name, q in plain.named_parameters():
                    assert torch.equal(found[name], first[name]), (schedule, name)
                    torch.testing.assert_close(found[name], q.grad)
