"""Hooks on parameters (``register_hook``) of stages on GPUs are called as in plain autograd."""

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext.engines.cuda import parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

WIDTH, M = 48, 8
ONE = ["cuda:0"] * 4
SEVERAL = [f"cuda:{rank % torch.cuda.device_count()}" for rank in range(4)] if torch.cuda.is_available() else []
SPLIT = [[f"{s}{kind}{m}" for kind in "FIW" for m in range(M)] for s in range(4)]


def chain():
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))


def batch():
    return torch.randn(2 * M, WIDTH, device="cuda"), torch.randn(2 * M, WIDTH, device="cuda")


class Momentum:
    """Replaces each gradient by a mean over those so far, in new memory each time."""

    def __init__(self):
        self.kept = self.previous = None

    def __call__(self, grad):
        if self.kept is not None:
            self.kept = 0.5 * self.kept + grad + self.previous
        else:
            self.kept = grad.clone()
        self.previous = grad
        return self.kept * 0.25


def in_place(grad):
    grad.mul_(3)


def watch(model):
    """Hooks of several kinds; returns what they hold, by parameter."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = Momentum()
        parameter.register_hook(found[name])
        if name.endswith("bias"):
            parameter.register_hook(in_place)
    return found


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("devices", [ONE, SEVERAL], ids=["one GPU", "several GPUs"])
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", SPLIT], ids=["1f1b", "gpipe", "zb-h1", "split"])
def test_gradients_and_what_hooks_keep_are_plain_autograds(schedule, devices, large, monkeypatch):
    monkeypatch.setattr(parameters, "_LARGE", 0 if large else parameters._LARGE)
    model = chain()
    plain = twin(model).cuda()
    kept, expected = watch(model), watch(plain)
    with pe.Pipeline(model, 4, M, schedule, F.mse_loss, devices=devices, trace=False) as pipe:
        for step in range(3):
            if step != 1:  # in the second one gradients are added to those of the first
                model.zero_grad()
                plain.zero_grad()
            x, y = batch()
            pipe.step(x, target=y)
            found = gradients(model)
            reference_step(plain, x, y, M, F.mse_loss)
            assert_same_gradients(plain, {name: grad.to(x.device) for name, grad in found.items()})
    for name in expected:
        assert torch.equal(kept[name].kept.to(x.device), expected[name].kept)


def test_hooks_may_share_what_they_keep():
    class Norm:
        total = 0.0

        def __call__(self, grad):
            self.total = self.total + grad.square().sum().double()

    model, shared = chain(), Norm()
    plain, expected = twin(model).cuda(), Norm()
    for trained, hook in ((model, shared), (plain, expected)):
        for parameter in trained.parameters():
            parameter.register_hook(hook)
    with pe.Pipeline(model, 4, M, loss_fn=F.mse_loss, devices=ONE, trace=False) as pipe:
        for _ in range(3):
            x, y = batch()
            pipe.step(x, target=y)
            reference_step(plain, x, y, M, F.mse_loss)
    assert shared.total.item() == pytest.approx(expected.total.item(), rel=1e-12)


def test_a_hook_that_is_gone_or_raises():
    model = chain()
    plain = twin(model).cuda()
    x, y = batch()
    reference_step(plain, x, y, M, F.mse_loss)
    fails = [True]

    def hook(grad):
        if fails[0]:
            raise ValueError("no")
        return grad[:1]

    handle = model[1][0].weight.register_hook(hook)
    with pe.Pipeline(model, 4, M, loss_fn=F.mse_loss, devices=ONE, trace=False) as pipe:
        for said in ("raised ValueError: no", "the size of value"):
            with pytest.raises(pe.StageError, match=said):
                pipe.step(x, target=y)
            assert all(p.grad is None for p in model.parameters())
            fails[0] = False
        handle.remove()
        pipe.step(x, target=y)
        assert_same_gradients(model, gradients(plain))


def test_no_graph_leaves_a_hook_out():
    model, calls = chain(), []
    model[2][0].weight.register_hook(lambda grad: calls.append(grad.shape))
    x, y = batch()
    with pe.Pipeline(model, 4, M, loss_fn=F.mse_loss, devices=ONE, graphs=True) as pipe:
        for _ in range(4):
            pipe.step(x, target=y)
        assert pipe.graph.fallback == "a parameter has a hook, which a replay would not call"
    assert len(calls) == 4 * M
