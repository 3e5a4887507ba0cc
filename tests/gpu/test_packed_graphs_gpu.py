"""Graphs of steps that pack: in each replay a message holds the results of that replay."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, reference_step, twin
from test_skips_gpu import unet
from torch import nn

import pipeline_ext as pe
from pipeline_ext.packing import Layout, packer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

WIDTH, M = 16, 8
ONE = ["cuda:0"] * 4
FP8 = torch.float8_e4m3fn


def batch(rows=2 * M):
    return torch.randn(rows, WIDTH, device="cuda"), torch.randn(rows, WIDTH, device="cuda")


def chain():
    return nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))


@pytest.mark.parametrize(
    "make, options",
    [
        (chain, {"pack": 3}),
        (chain, {"pack": "all", "pack_forward": 2, "schedule": "zb-h1"}),
        (chain, {"wire": torch.bfloat16, "wire_forward": torch.float16, "pack_forward": 2}),
        (chain, {"wire": FP8, "wire_forward": FP8, "pack": 2}),
        (unet, {"pack": 2, "pack_skips": {"far": 3, "near": 2}}),
    ],
    ids=["gradients", "both", "wire", "float8", "skips"],
)
def test_a_replay_packs_what_an_eager_step_does(make, options):
    model = make()
    other = copy.deepcopy(model)
    found = []
    batches = [batch() for _ in range(6)]
    for trained, graphs in ((other, False), (model, True)):
        found.append([])
        with pe.Pipeline(
            trained, 4, M, loss_fn=F.mse_loss, devices=ONE, trace=False, graphs=graphs, **options
        ) as pipe:
            for x, y in batches:
                trained.zero_grad()
                loss = pipe.step(x, target=y)
                found[-1].append((loss, gradients(trained)))
            if graphs:
                assert pipe.graph.fallback is None and pipe.graph.captured == 1
    for (loss, eager), (replayed_loss, replayed) in zip(*found):
        assert torch.equal(loss, replayed_loss)
        assert all(torch.equal(eager[name], replayed[name]) for name in eager)
    if not any(name.startswith("wire") for name in options):
        plain = twin(model).cuda()
        for (x, y), (_, replayed) in zip(batches, found[1]):
            plain.zero_grad()
            reference_step(plain, x, y, M, F.mse_loss)
            assert_same_gradients(plain, replayed)


def test_a_graph_keeps_its_tables_when_steps_of_another_kind_have_others():
    model = chain()
    plain = twin(model).cuda()

    def step(rows):
        x, y = batch(rows)
        model.zero_grad()
        plain.zero_grad()
        pipe.step(x, target=y)
        reference_step(plain, x, y, M, F.mse_loss)
        assert_same_gradients(plain, gradients(model))

    options = {"pack": 2, "pack_forward": 4, "wire_forward": torch.float32, "graphs": True}
    with pe.Pipeline(model, 4, M, loss_fn=F.mse_loss, devices=ONE, trace=False, **options) as pipe:
        for rows in (16, 16, 16, 24, 24, 16, 24, 32):
            step(rows)
            gc.collect()
            junk = [torch.full((1000,), -1, device="cuda") for _ in range(200)]  # what was freed is overwritten
            del junk
        for rows in (16, 24, 16, 24):
            step(rows)
        assert pipe.graph.fallback is None and pipe.graph.captured == 2


def test_a_captured_binding_happens_in_each_replay():
    sent = [torch.randn(5, 7, device="cuda").t(), torch.arange(3, device="cuda")]
    layout = Layout.of(sent)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda")
    packs = packer(layout, sent)
    packs.pack(buffer)
    bound = [torch.zeros(5, 7, device="cuda").t(), torch.zeros(3, dtype=torch.int64, device="cuda")]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        packs.rebind(bound)
        packs.pack(buffer)
    for number in range(3):
        packs.rebind(sent)
        packs.pack(buffer)
        for tensor in bound:
            tensor.fill_(number)
        graph.replay()
        assert all(map(torch.equal, layout.views(buffer), bound))
    with pytest.raises(pe.PipelineError, match="a packer was made while a CUDA graph was captured"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda")
            packer(layout, sent)
