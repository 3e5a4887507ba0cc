"""Random numbers on GPUs: the same in whatever stage a layer runs, and as the unsplit model draws them."""

import pytest
import torch
import torch.nn.functional as F
from reference import gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LANES = {"devices": ["cuda:0"] * 4}
SINGLE = {"schedule": "interleaved-1f1b", "devices": ["cuda:0"], "overlap": False}
GRAPHS = {"devices": ["cuda:0"] * 4, "graphs": True}
TWO = {"devices": ["cuda:0", "cuda:1"] * 2}
MODES = pytest.mark.parametrize("mode", [LANES, SINGLE, GRAPHS], ids=["lanes", "single stream", "graphs"])
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


class Block(nn.Module):
    def __init__(self, recomputes):
        super().__init__()
        self.linear, self.dropout, self.recomputes = nn.Linear(16, 16), nn.Dropout(0.3), recomputes

    def inner(self, x):
        return x + self.dropout(self.linear(x))

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False) if self.recomputes else self.inner(x)


def sequential():
    return nn.Sequential(*(Block(recomputes=i == 1) for i in range(4)))


class OwnForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(sequential())

    def forward(self, x):
        for block in self.blocks:
            x = block(x) * 1.5
        return x


def make(kind, mode, device="cuda", **options):
    torch.manual_seed(3)
    model = kind().to(device)
    sample = {} if kind is sequential else {"sample": (torch.randn(16, 16, device=device),)}
    return pe.Pipeline(model, 4, 4, loss_fn=F.mse_loss, **{**mode, **sample, **options}), model


def batch():
    return torch.randn(16, 16), torch.randn(16, 16)


@MODES
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [sequential, OwnForward], ids=["sequential", "own forward"])
def test_a_model_with_dropout_is_cut_on_a_gpu_and_verified_bit_for_bit(kind, device, mode):
    pipe, _ = make(kind, mode, device)
    x, y = batch()
    with pipe:
        before = torch.cuda.get_rng_state()
        report = pipe.verify(x, target=y)
        assert report.ok and report.worst_microbatched == 0 and report.loss == report.loss_microbatched
        assert torch.equal(torch.cuda.get_rng_state(), before)
        assert any("draws random numbers" in reason for reason in report.reasons)
        assert any("without its graph" in reason for reason in report.reasons) == (mode is GRAPHS)


@pytest.mark.parametrize("kind", [sequential, OwnForward], ids=["sequential", "own forward"])
@pytest.mark.parametrize("other", [SINGLE, pytest.param(TWO, marks=needs_two)], ids=["one stream", "two GPUs"])
def test_the_same_seed_draws_the_same_whatever_the_schedule_and_the_devices(kind, other):
    found = []
    x, y = batch()
    for mode in (LANES, other):
        pipe, model = make(kind, mode)
        torch.manual_seed(5)
        with pipe:
            losses = [pipe.step(x, target=y).item() for _ in range(2)]
        assert losses[0] != losses[1]
        found.append((losses, {name: grad.cpu() for name, grad in gradients(model).items()}))
    (losses, grads), (of_other, grads_of_other) = found
    assert losses == of_other and all(torch.equal(grads[name], grads_of_other[name]) for name in grads)


@needs_two
def test_verify_of_stages_on_two_gpus_says_how_to_verify():
    pipe, _ = make(sequential, TWO)
    x, y = batch()
    with pipe, pytest.raises(pe.InvalidArgument, match=r'on 2; .*devices=\["cuda:0"\] \* 4'):
        pipe.verify(x, target=y)
