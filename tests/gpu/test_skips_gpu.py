"""Skip connections between stages on GPUs, and models whose own code needs early results late."""

import pytest
import torch
import torch.nn.functional as F
from models import masked
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

WIDTH = 16
ONE = ["cuda:0"] * 4
SEVERAL = [f"cuda:{rank % torch.cuda.device_count()}" for rank in range(4)] if torch.cuda.is_available() else []
DEVICES = pytest.mark.parametrize("devices", [ONE, SEVERAL], ids=["one GPU", "several GPUs"])
SPLIT = [[f"{s}{kind}{m}" for kind in "FIW" for m in range(8)] for s in range(4)]


@pe.skips(stash=lambda level: level.stashes, pop=lambda level: level.pops)
class Level(nn.Module):
    """A level of a U-Net, which hands on what it has stashed, or something else."""

    def __init__(self, stashes=(), pops=(), same=False):
        super().__init__()
        self.stashes, self.pops, self.same = stashes, pops, same
        self.mix = nn.Linear(WIDTH * (1 + len(pops)), WIDTH)

    def forward(self, x):
        x = torch.tanh(self.mix(torch.cat([x, *(pe.pop(name) for name in self.pops)], 1)))
        for name in self.stashes:
            pe.stash(name, x)
        return x if self.same else x + x.sin()


def unet():
    """Skips over two boundaries, over three, to the neighbor, and two of one tensor."""
    return nn.Sequential(
        Level(["far", "twice"], same=True),
        Level(["near"]),
        Level([], ["near", "twice"]),
        Level([], ["far"]),
    )


def batch(rows=19):
    return torch.randn(rows, WIDTH).cuda(), torch.randn(rows, WIDTH).cuda()


def assert_trains_as_plain(pipe, model, plain, steps=2, same=torch.equal):
    found = []
    for _ in range(steps):  # nothing waits for the GPU in between
        x, y = batch()
        model.zero_grad()
        found.append((x, y, pipe.step(x, target=y), gradients(model), pipe.eval(x)))
    for x, y, loss, grads, outputs in found:
        plain.zero_grad()
        assert torch.equal(loss.to(x.device), reference_step(plain, x, y, 8, F.mse_loss))
        for name, p in plain.named_parameters():
            assert same(grads[name].to(x.device), p.grad), name
        assert torch.equal(outputs.to(x.device), torch.cat([plain(part) for part in x.tensor_split(8)]))


@DEVICES
@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zb-h1", SPLIT], ids=["1f1b", "gpipe", "zb-h1", "split"])
@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_are_those_of_the_plain_model(schedule, overlap, devices):
    model = unet()
    plain = twin(model).cuda()
    for k, pack in ((1, 1), (3, 2)):
        packs = {"pack": pack, "pack_forward": pack, "pack_skips": {"far": k, "near": 2 * k, "twice": k}}
        with pe.Pipeline(
            model, 4, 8, schedule, F.mse_loss, devices=devices, overlap=overlap, trace=False, **packs
        ) as pipe:
            assert_trains_as_plain(pipe, model, plain)


@DEVICES
@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "zbv", "dualpipev"])
def test_ranks_with_two_stages(schedule, devices):
    model = unet()
    plain = twin(model).cuda()
    options = {"devices": devices[:2], "pack_skips": {"far": 2}, "trace": False}
    with pe.Pipeline(model, 4, 8, schedule, F.mse_loss, **options) as pipe:
        assert_trains_as_plain(pipe, model, plain)


@DEVICES
def test_what_has_no_gradient_is_skipped_too(devices):
    model = masked(16, 4)
    plain = twin(model).cuda()
    for k in (1, 3):
        with pe.Pipeline(
            model, 4, 8, "zb-h1", F.mse_loss, devices=devices, pack_skips={"mask": k}, trace=False
        ) as pipe:
            assert_trains_as_plain(pipe, model, plain)


@DEVICES
def test_a_wire_type_holds_for_skips_too(devices):
    model, (x, y) = unet(), batch()
    plain = twin(model).cuda()
    expected = reference_step(plain, x, y, 8, F.mse_loss)
    settings = {"wire": torch.bfloat16, "wire_forward": torch.bfloat16, "pack_skips": {"far": 2}}
    with pe.Pipeline(model, 4, 8, "1f1b", F.mse_loss, devices=devices, **settings) as pipe:
        found = pipe.step(x, target=y).to(x.device)
        assert torch.allclose(found, expected, rtol=0.05) and not torch.equal(found, expected)
        far = [m for m in pipe.trace.messages if m.skip == "far"]
        assert [(m.count, m.packed_nbytes > 0) for m in far] == [(4, True), (4, True)]
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(p.grad.to(q.device), q.grad, atol=0.05)


@DEVICES
@pytest.mark.parametrize("k", [1, 2])
def test_memory_that_a_stage_between_changes_in_place_is_refused(k, devices):
    model = nn.Sequential(Level(["a"], same=True), nn.ReLU(inplace=True), Level(), Level([], ["a"]))
    x, y = batch(8)
    packs = {"pack_skips": {"a": k}, "devices": ["cuda:0", "cuda:0", *devices[2:]]}
    with pe.Pipeline(model, 4, 8, "gpipe", F.mse_loss, **packs) as pipe:
        with pytest.raises(pe.StageError) as raised:
            pipe.step(x, target=y)
        assert "changed in place" in str(raised.value.__cause__)


def test_a_graph_has_the_skips_in_it():
    model = unet()
    plain = twin(model).cuda()
    with pe.Pipeline(model, 4, 8, "1f1b", F.mse_loss, devices=ONE, graphs=True) as pipe:
        for _ in range(5):
            x, y = batch()
            model.zero_grad()
            plain.zero_grad()
            expected = reference_step(plain, x, y, 8, F.mse_loss)
            assert torch.equal(pipe.step(x, target=y), expected)
            assert_same_gradients(plain, gradients(model))
        assert pipe.graph.fallback is None and pipe.graph.captured == 1


class Glued(nn.Module):
    """Its own code adds early results to later ones, and gives a mask to every layer."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(8))

    def forward(self, x):
        mask, kept = (x > -0.5).to(x.dtype), []
        for layer in self.layers[:4]:
            x = torch.tanh(layer(x) * mask)
            kept.append(x)
        for layer in self.layers[4:]:
            x = layer(x + kept.pop() * mask).sin()
        return x + mask


def nearly(a, b):
    """Whether they differ by no more than gradients that are added up in another order."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@DEVICES
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("k", [1, 2])
def test_a_model_whose_own_code_needs_early_results_late(schedule, k, devices):
    model = Glued()
    plain = twin(model).cuda()
    options = {"devices": devices, "pack": k, "pack_forward": k, "trace": False, "sample": batch()[0].cpu()}
    with pe.Pipeline(model, 4, 8, schedule, F.mse_loss, **options) as pipe:
        assert pipe.num_stages == 4
        assert_trains_as_plain(pipe, model, plain, same=nearly)
