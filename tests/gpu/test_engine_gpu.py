"""Ranks on the streams of a GPU: gradients, memory, overlap, and whole steps as graphs."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import GRAPHS, LANES, SINGLE
from models import Residual
from reference import gradients, reference_step, twin
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe
from pipeline_ext.engines.cuda.torch_side import GraphMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

MODES = pytest.mark.parametrize("mode", [SINGLE, LANES, GRAPHS], ids=["single stream", "lanes", "graphs"])
STEPS = 5  # the third is captured
SPLIT = [[f"{s}{kind}{m}" for kind in "FIW" for m in range(8)] for s in range(4)]


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False, preserve_rng_state=False)


def blocks(count=4, wrap=lambda module: module):
    return nn.Sequential(*(wrap(Residual(64)) for _ in range(count)))


def batch(rows=32, width=64):
    return torch.randn(rows, width), torch.randn(rows, width)


def pipeline(model, mode, microbatches=8, **options):
    return pe.Pipeline(model, 4, microbatches, **{"loss_fn": F.mse_loss, **mode, **options})


def train(model, mode, x, y, **options):
    """The gradients of each step, and what the pipeline says of its graph."""
    found = []
    with pipeline(model, mode, **options) as pipe:
        for _ in range(STEPS):
            model.zero_grad()
            loss = pipe.step(x, target=y)
            found.append((loss.item(), {name: g.cpu() for name, g in gradients(model).items()}))
        if mode is GRAPHS:
            assert pipe.graph.fallback is None and pipe.graph.captured == 1 and pipe.graph.nodes > 0
    return found


def assert_near(found, expected, rtol=1e-4):
    for name in expected:
        scale = expected[name].abs().max()
        assert (found[name] - expected[name]).abs().max() <= rtol * scale, name


@MODES
def test_gradients_are_the_cpus_within_rounding(mode):
    model, (x, y) = blocks(), batch()
    plain = twin(model)
    loss = reference_step(plain, x, y, 8, F.mse_loss)
    for found_loss, found in train(model, mode, x, y):
        assert found_loss == pytest.approx(loss.item(), rel=1e-5)
        assert_near(found, gradients(plain))


OPTIONS = [{}, {"pack": 4, "pack_forward": 2}, {"schedule": "gpipe"}, {"schedule": SPLIT}]


@pytest.mark.parametrize("options", OPTIONS, ids=["1f1b", "packed", "gpipe", "in two parts"])
def test_lanes_and_graphs_give_the_bits_of_a_single_stream(options):
    model, (x, y) = blocks(), batch()
    (_, expected), *_ = train(copy.deepcopy(model), SINGLE, x, y)
    for mode in (LANES, GRAPHS):
        for _, found in train(copy.deepcopy(model), mode, x, y, **options):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_plain_accumulation_on_the_gpu_gives_the_same_bits():
    model, (x, y) = blocks(), batch()
    plain = twin(model).cuda()
    reference_step(plain, x.cuda(), y.cuda(), 8, F.mse_loss)
    expected = {name: grad.cpu() for name, grad in gradients(plain).items()}
    (_, found), *_ = train(model, LANES, x, y)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@MODES
def test_a_step_does_not_wait_for_the_gpu(mode):
    model = blocks()
    x, y = (t.cuda() for t in batch())
    with pipeline(model, mode, trace=False) as pipe:
        for _ in range(STEPS):
            model.zero_grad()
            pipe.step(x, target=y)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model.zero_grad()
            pipe.step(x, target=y)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@MODES
def test_memory_returns_to_its_start_and_does_not_grow(mode):
    def use():
        model = blocks()
        x, y = (t.cuda() for t in batch())
        sizes = []
        with pipeline(model, mode, trace=False) as pipe:
            for number in range(1000):
                model.zero_grad()
                pipe.step(x, target=y)
                if number in (20, 999):
                    torch.cuda.synchronize()
                    sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        assert sizes[0] == sizes[1]

    def left():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    use()  # workspaces of the libraries are made once
    before = left()
    use()
    assert left() == before


def test_many_pipelines_take_the_memory_of_one():
    def use(graphs):
        model = blocks()
        x, y = (t.cuda() for t in batch())
        with pipeline(model, GRAPHS if graphs else LANES) as pipe:
            for _ in range(3):
                pipe.step(x, target=y)

    sizes = []
    for number in range(12):
        use(graphs=number % 2 == 1)
        gc.collect()
        torch.cuda.synchronize()
        sizes.append(torch.cuda.memory_allocated())
    assert sizes[-1] == sizes[1]


class _Spin(torch.autograd.Function):
    """Keeps one multiprocessor busy, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        torch.cuda._sleep(2_000_000)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        torch.cuda._sleep(4_000_000)
        return grad.clone()


class Spin(nn.Linear):
    def forward(self, x):
        return super().forward(_Spin.apply(x))


@pytest.mark.parametrize("graphs", [False, True])
def test_forwards_and_backwards_run_at_the_same_time(graphs):
    model = nn.Sequential(Spin(8, 8), Spin(8, 8))
    x = torch.randn(16, 8, device="cuda", requires_grad=not graphs)
    options = {"devices": ["cuda:0"] * 2, "graphs": graphs}
    with pe.Pipeline(model, 2, 8, loss_fn=F.mse_loss, **options) as pipe:
        for _ in range(STEPS):
            pipe.step(x, target=x.detach())
        tasks = pipe.trace.tasks
        together = [
            (f.action, b.action)
            for f in tasks
            for b in tasks
            if (f.kind, b.kind, f.rank) == ("F", "B", b.rank) and f.begin < b.end and b.begin < f.end
        ]
        assert len(together) >= 4
        assert pipe.trace.step_time < 0.9 * sum(task.end - task.begin for task in tasks) / 1.0
        for task in tasks:
            for after in pipe.plan.successors(task.task):
                begin = next(t.begin for t in tasks if t.task == after)
                assert begin >= task.end - 2e-6  # the clock of events ticks in half microseconds
        if graphs:
            assert pipe.graph.fallback is None


@MODES
@pytest.mark.parametrize("kind", ["checkpoint", "compile", "autocast", "tied", "LSTM", "sparse"])
def test_what_models_are_made_of(mode, kind):
    if kind == "compile" and torch.cuda.get_device_name().startswith("software"):
        pytest.skip("a software GPU runs no kernels that torch.compile made")
    x, y = batch()
    context = torch.autocast("cuda", dtype=torch.bfloat16, enabled=kind == "autocast")
    model, loss_fn, rtol = blocks(), F.mse_loss, 1e-4
    if kind == "checkpoint":
        model = blocks(wrap=Checkpointed)
    elif kind == "compile":
        model = [torch.compile(block) for block in model]
    elif kind == "autocast":
        rtol = 5e-2
    elif kind == "tied":
        model[3].up.weight = model[0].up.weight
    elif kind == "LSTM":
        model = nn.Sequential(*(Recurrent() for _ in range(4)))
        x, y, rtol = x.view(32, 4, 16), y.view(32, 4, 16), 1e-3
    elif kind == "sparse":
        model = nn.Sequential(nn.Embedding(50, 64, sparse=True), Residual(64), Residual(64), Residual(64))
        x = torch.randint(50, (32,))
    modules = nn.ModuleList(model)
    plain = nn.Sequential(*copy.deepcopy(list(model)))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (modules, plain)]
    plain.cuda()
    with pipeline(model, mode) as pipe:
        for _ in range(STEPS):
            for optimizer in optimizers:
                optimizer.zero_grad()
            with context:
                loss = pipe.step(x, target=y)
                expected = reference_step(plain, x.cuda(), y.cuda(), 8, loss_fn)
            assert loss.item() == pytest.approx(expected.item(), rel=rtol)
            for p, q in zip(modules.parameters(), plain.parameters()):
                assert p.grad.is_sparse == q.grad.is_sparse
                mine, theirs = p.grad.to_dense().float(), q.grad.to_dense().float()
                assert (mine - theirs).abs().max() <= rtol * theirs.abs().max()
            for optimizer in optimizers:
                optimizer.step()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x):
        return self.inner(x)[0]


def test_dropout_draws_anew_in_each_replay():
    model = nn.Sequential(*(nn.Sequential(Residual(64), nn.Dropout(0.5)) for _ in range(4)))
    x, y = batch()
    with pipeline(model, GRAPHS) as pipe:
        losses = [pipe.step(x, target=y).item() for _ in range(2 * STEPS)]
        assert pipe.graph.fallback is None
    assert len(set(losses)) == len(losses)


def test_an_optimizer_inside_the_graph_does_what_it_does_outside():
    model, (x, y) = blocks(), batch()
    found = []
    for graphs in (False, True):
        trained = copy.deepcopy(model).cuda()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, capturable=True)
        with pipeline(trained, GRAPHS if graphs else LANES, optimizer=optimizer) as pipe:
            for _ in range(8):
                optimizer.zero_grad()
                pipe.step(x, target=y)
            if graphs:
                assert pipe.graph.fallback is None
        found.append([p.detach().cpu() for p in trained.parameters()])
    assert all(map(torch.equal, *found))


class Item(nn.Module):
    def forward(self, x):
        return x * (1.0 + 0.0 * x.sum().item())


def test_after_a_capture_that_failed_torch_works_as_before(capsys):
    model = nn.Sequential(Residual(64), Item(), nn.Dropout(0.1), Residual(64))
    x, y = batch()
    stream = torch.cuda.current_stream()
    with pipeline(model, GRAPHS) as pipe:
        for _ in range(STEPS):
            assert pipe.step(x, target=y).isfinite()
        assert "cannot be captured" in pipe.graph.fallback
    assert "steps run eagerly" in capsys.readouterr().out
    assert torch.cuda.current_stream() == stream
    F.dropout(torch.ones(10, device="cuda"))
    del pipe
    gc.collect()
    torch.cuda.empty_cache()
    found = train(blocks(), GRAPHS, x, y)
    assert len(found) == STEPS


def test_captures_that_failed_leave_no_memory_behind():
    x, y = batch()

    def reserved_after_one():
        model = nn.Sequential(Residual(64), Item(), Residual(64), Residual(64))
        with pipeline(model, GRAPHS, trace=False) as pipe:
            for _ in range(3):
                model.zero_grad()
                pipe.step(x, target=y)
            assert "cannot be captured" in pipe.graph.fallback
        del model, pipe
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    reserved_after_one()
    first = reserved_after_one()
    assert [reserved_after_one() for _ in range(3)] == [first] * 3


@pytest.mark.parametrize("is_counted_down", [False, True])
def test_memory_of_a_failed_capture_is_released_whether_or_not_torch_has_counted_down(is_counted_down):
    device = torch.device("cuda:0")
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    memory = GraphMemory(device)
    torch._C._cuda_beginAllocateCurrentThreadToPool(0, memory.handle)
    kept, freed = torch.ones(2**24, device=device), torch.ones(2**24, device=device)
    torch._C._cuda_endAllocateToPool(0, memory.handle)
    if is_counted_down:
        torch._C._cuda_releasePool(0, memory.handle)
    del freed
    memory.release()
    assert torch.cuda.memory_reserved() - before == kept.nbytes
    del kept
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


def test_all_graphs_of_a_pipeline_are_captured_on_one_stream(monkeypatch):
    streams, capture = [], torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *a, **k: streams.append(k["stream"]) or capture(*a, **k))
    model = blocks()
    with pipeline(model, GRAPHS, trace=False) as pipe:
        for rows in (32, 48):
            x, y = batch(rows)
            for _ in range(3):
                model.zero_grad()
                pipe.step(x, target=y)
    assert len(streams) == pipe.graph.captured == 2 and len(set(streams)) == 1


class Fails(nn.Module):
    left = 3

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise ValueError("no")
        return x


@MODES
def test_a_mean_that_is_not_over_rows_is_refused_in_the_first_step(mode):
    model, x, labels = blocks(), torch.randn(32, 64), torch.arange(32)
    loss_fn = nn.CrossEntropyLoss(ignore_index=0)
    with pipeline(model, mode, loss_fn=loss_fn) as pipe:
        with pytest.raises(pe.InvalidArgument, match=r"count_not\(0\) for labels that are left out"):
            pipe.step(x, target=labels)
        assert all(p.grad is None for p in model.parameters())
    if mode is GRAPHS:  # these take another way, which the error of loss_weight= names
        weighed = {"loss_fn": lambda out, y: F.cross_entropy(out, y, ignore_index=0, reduction="sum") / 31}
        weighed["loss_reduction"] = "sum"
    else:
        weighed = {"loss_fn": loss_fn, "loss_weight": pe.count_not(0)}
    plain = twin(model)
    loss = loss_fn(plain(x.cuda()), labels.cuda())
    loss.backward()
    with pipeline(model, mode, **weighed) as pipe:
        for _ in range(STEPS):
            model.zero_grad()
            torch.testing.assert_close(pipe.step(x, target=labels), loss.detach(), rtol=1e-4, atol=1e-5)
            assert_near(gradients(model), gradients(plain))


def test_a_stage_that_raises_leaves_no_gradients_and_the_next_step_works():
    model = nn.Sequential(Residual(64), Residual(64), Fails(), Residual(64))
    x, y = batch()
    plain = nn.Sequential(*(copy.deepcopy(model[i]) for i in (0, 1, 3)))
    loss = reference_step(plain, x, y, 8, F.mse_loss)
    with pipeline(model, LANES) as pipe:
        with pytest.raises(pe.StageError, match="raised ValueError: no"):
            pipe.step(x, target=y)
        assert all(p.grad is None for p in model.parameters())
        assert pipe.step(x, target=y).item() == pytest.approx(loss.item(), rel=1e-5)


def test_training_takes_the_gpu_by_default(tmp_path):
    import json

    from pipeline_ext.cli import main

    out = tmp_path / "run"
    arguments = f"train --steps 6 --batch 16 --context 64 --width 64 --heads 4 --layers 4 --out {out}"
    assert main([*arguments.split(), "--microbatches", "4", "--json", str(tmp_path / "summary.json")]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["val_bpb_last"] < summary["val_bpb_first"]
    assert (out / "timeline.png").exists() or (out / "trace.json").exists()
