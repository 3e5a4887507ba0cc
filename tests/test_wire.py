"""Results that travel as another type: how far gradients may then be off, and that nothing else is."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from models import chain
from reference import gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext.cli import main
from pipeline_ext.transport.message import choose_format

# Largest relative error of one rounding: half a unit in the last place.
ROUNDING = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
    torch.float8_e5m2: 2.0**-3,
}


def relative_errors(model, expected):
    return [
        float((p.grad - expected[name]).norm() / expected[name].norm()) for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize("pack", [1, 2, "all"])
@pytest.mark.parametrize("wire", list(ROUNDING), ids=str)
def test_gradients_are_off_by_their_rounding_alone(wire, pack):
    """Linear layers pass an error on as it is, so each cut adds at most one rounding's."""
    torch.manual_seed(1)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    x, y, plain = torch.randn(24, 16), torch.randn(24, 16), twin(model)
    with pe.Pipeline(model, 4, 6, loss_fn=F.mse_loss, loss_reduction="sum", pack=pack, wire=wire) as pipe:
        for _ in range(3):
            model.zero_grad()
            loss = pipe.step(x, target=y)
        plain_loss = reference_step(plain, x, y, 6, F.mse_loss, reduction="sum")
        assert torch.equal(loss, plain_loss)  # activations travel as they are
        by_layer = relative_errors(model, gradients(plain))[::2]
        for layer, error in enumerate(by_layer):
            cuts = 3 - layer
            assert error <= cuts * ROUNDING[wire] * 1.5
        assert by_layer[3] == 0.0
        assert by_layer[0] > ROUNDING[wire] / 50  # it did travel as that type


@pytest.mark.parametrize("wire", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1.0, 1e12])
def test_float8_keeps_its_precision_whatever_the_size_of_gradients(wire, size):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x, y, plain = torch.randn(8, 8), torch.randn(8, 8), twin(model)

    def loss_fn(output, target):
        return F.mse_loss(output, target) * size

    with pe.Pipeline(model, 2, 4, loss_fn=loss_fn, pack=2, wire=wire) as pipe:
        for _ in range(2):
            model.zero_grad()
            pipe.step(x, target=y)
    reference_step(plain, x, y, 4, loss_fn)
    assert max(relative_errors(model, gradients(plain))) <= 1.5 * ROUNDING[wire]


class Float8:
    """Messages of one format, one after another."""

    def __init__(self, wire):
        self.wire = wire
        self.format = None

    def send(self, tensors):
        """The scales that travelled, and what arrived."""
        self.format, regions = choose_format(tensors, self.wire, self.format)
        buffer = torch.empty(self.format.nbytes, dtype=torch.uint8)
        self.format.pack(tensors, regions, buffer)
        scales = self.format._scales_in(buffer)[: len(tensors)].tolist()
        return scales, self.format.open(buffer)


def test_float8_scales_come_from_the_step_before():
    messages = Float8(torch.float8_e4m3fn)
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([100.0]), torch.zeros(2)]
    # 3 comes to lie between 112 and 224, 100 stays there; what there was none of before is not scaled.
    scales, arrived = messages.send(tensors)
    assert scales == [64.0, 2.0, 1.0]
    assert [t.tolist() for t in arrived] == [[1.0, -3.0], [96.0], [0.0, 0.0]]
    scales, arrived = messages.send([tensors[0] * 2, tensors[1] / 2, tensors[2]])
    assert scales == [64.0, 2.0, 1.0]
    assert [t.tolist() for t in arrived] == [[2.0, -6.0], [48.0], [0.0, 0.0]]
    assert messages.send(tensors)[0] == [32.0, 4.0, 1.0]


@pytest.mark.parametrize("wire", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("before", [0.0, math.inf, math.nan, 1e-20, 1e20])
def test_float8_scales_that_do_not_fit_are_found_anew(wire, before):
    messages = Float8(wire)
    x = torch.randn(64)
    messages.send([torch.full((64,), before)])
    _, (arrived,) = messages.send([x])
    assert (arrived - x).abs().max() <= ROUNDING[wire] * x.abs().max()


def test_infinity_and_nan_arrive():
    tensors = [torch.tensor([1.0, math.inf, -math.inf, math.nan]), torch.tensor([2.0])]
    for wire in (torch.bfloat16, torch.float16, torch.float8_e5m2):
        messages = Float8(wire)
        for _ in range(2):
            format, regions = choose_format(tensors, wire, messages.format)
            buffer = torch.empty(format.nbytes, dtype=torch.uint8)
            format.pack(tensors, regions, buffer)
            arrived, finite = format.open(buffer)
            assert torch.equal(arrived.nan_to_num(7.0), tensors[0].nan_to_num(7.0))
            assert finite.tolist() == [2.0]


def test_float8_e4m3fn_which_has_no_infinity_makes_nan_of_the_tensor_that_held_one():
    messages = Float8(torch.float8_e4m3fn)
    for _ in range(2):
        _, (arrived, finite) = messages.send([torch.tensor([1.0, math.inf]), torch.tensor([2.0])])
        assert arrived.isnan().all()
        assert finite.tolist() == [2.0]
    assert messages.send([torch.tensor([1.0, 4.0]), torch.tensor([2.0])])[1][0].tolist() == [1.0, 4.0]


def test_an_evaluation_does_not_depend_on_those_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity())
    small, large = torch.randn(6, 4) * 1e-4, torch.randn(6, 4) * 10
    results = []
    for first in (small, large):
        with pe.Pipeline(model, 2, 3, wire_forward=torch.float8_e4m3fn) as pipe:
            pipe.eval(first)
            results.append(pipe.eval(large))
    assert torch.equal(*results)


@pytest.mark.parametrize("wire", list(ROUNDING), ids=str)
def test_a_frozen_first_stage_has_nothing_to_cast(wire):
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4))
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss, wire=wire, pack=2) as pipe:
        pipe.step(torch.randn(6, 4), target=torch.randn(6, 4))


def test_each_boundary_has_its_own_wire_type():
    model, x, y = chain(layers=6), torch.randn(12, 12), torch.randn(12, 12)
    plain = twin(model)
    reference_step(plain, x, y, 4, F.mse_loss)
    expected = gradients(plain)
    with pe.Pipeline(model, 3, 4, loss_fn=F.mse_loss, wire={0: torch.bfloat16}) as pipe:
        pipe.step(x, target=y)
        nbytes = {(m.boundary, m.direction): m.packed_nbytes for m in pipe.trace.messages}
        last_two = [p for stage in pipe.stage_modules[1:] for p in stage.parameters()]
        names = {id(p): name for name, p in model.named_parameters()}
        assert all(torch.equal(p.grad, expected[names[id(p)]]) for p in last_two)
        assert max(relative_errors(model, expected)) > 0
    assert nbytes[0, "backward"] == 4 * 3 * 12 * 2
    assert nbytes[1, "backward"] == 0


def test_activations_are_cast_in_step_and_eval_alike():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Identity()), torch.randn(6, 4)
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss, wire_forward=torch.bfloat16, pack_forward=2) as pipe:
        expected = model(x).bfloat16().float()
        _, output = pipe.step(x, target=x, return_outputs=True)
        torch.testing.assert_close(output, expected, rtol=2**-7, atol=0)
        assert torch.equal(output, output.bfloat16().float())
        assert torch.equal(pipe.eval(x), output)


def test_integers_travel_as_they_are():
    class Ids(nn.Module):
        def forward(self, x):
            return {"ids": torch.arange(len(x)) * 1_000_003, "mask": x > 0, "x": x}

    class Check(nn.Module):
        def forward(self, values):
            assert torch.equal(values["ids"], torch.arange(len(values["x"])) * 1_000_003)
            assert values["mask"].dtype == torch.bool
            assert values["x"].dtype == torch.float64
            return values["x"].float()

    stages = [nn.Sequential(nn.Linear(3, 3).double(), Ids()), Check()]
    with pe.Pipeline(
        stages, microbatches=2, loss_fn=F.mse_loss, wire_forward=torch.float8_e4m3fn, pack_forward=2
    ) as pipe:
        pipe.step(torch.randn(4, 3, dtype=torch.float64), target=torch.randn(4, 3))


def test_the_default_training_s_loss_is_the_same_within_half_a_percent_at_bfloat16(tmp_path, request):
    """A few of its steps, with --all a tenth; all of them are in docs/benchmarks.md."""
    bits, steps = {}, "48" if request.config.getoption("--all") else "16"
    for wire in ("none", "bfloat16"):
        summary = tmp_path / f"{wire}.json"
        arguments = ["train", "--steps", steps, "--out", str(tmp_path / wire), "--json", str(summary)]
        assert main([*arguments, "--wire", wire, "--wire-forward", wire, "--pack", "2"]) == 0
        bits[wire] = json.loads(summary.read_text())["val_bpb_last"]
    assert bits["none"] != bits["bfloat16"]
    assert bits["bfloat16"] == pytest.approx(bits["none"], rel=0.005)
