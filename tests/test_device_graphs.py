"""Whole steps as graphs: when they are captured, what they give, and when steps run eagerly instead."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from device_double import install
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe


@pytest.fixture(autouse=True)
def gpu(standin, monkeypatch):
    return install(monkeypatch, standin, devices=1)


def make(stages=2, microbatches=4, **options):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
    options = {"loss_fn": F.mse_loss, "graphs": True, **options}
    return model, pe.Pipeline(model, stages, microbatches, **options)


def batch(rows=8):
    return torch.randn(rows, 6), torch.randn(rows, 6)


def test_two_steps_run_eagerly_and_the_third_is_a_graph(gpu, standin):
    gc.collect()
    before = standin.live()["graph"]
    model, pipe = make()
    with pipe:
        for number in range(6):
            x, y = batch()
            plain = twin(model)
            model.zero_grad()
            losses = []
            loss, out = pipe.step(x, target=y, losses=losses, return_outputs=True)
            assert torch.equal(loss, reference_step(plain, x, y, 4, F.mse_loss))
            assert_same_gradients(model, gradients(plain))
            parts = [F.mse_loss(plain(a), b) for a, b in zip(x.tensor_split(4), y.tensor_split(4))]
            assert torch.equal(torch.stack(losses), torch.stack(parts))
            assert torch.equal(out, torch.cat([plain(a) for a in x.tensor_split(4)]))
            assert gpu.launches == max(0, number - 1)
        assert pipe.graph.captured == 1 and pipe.graph.fallback is None
    assert standin.live()["graph"] == before


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_inside_a_capture_of_the_callers_is_refused_and_nothing_is_lost(gpu, graphs):
    model, pipe = make(graphs=graphs)
    x, y = batch()
    with pipe:
        pipe.step(x, target=y)
        before = {name: p.grad.clone() for name, p in model.named_parameters()}
        gpu.capturing = True
        for call in (lambda: pipe.step(x, target=y), lambda: pipe.eval(x)):
            with pytest.raises(pe.InvalidArgument, match="is being captured.*give graphs=True.*outside of"):
                call()
        gpu.capturing = False
        assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
        pipe.step(x, target=y)


def test_a_step_of_backwards_in_two_parts_is_a_graph_too(gpu):
    orders = [[f"{s}{kind}{m}" for kind in "FIW" for m in range(4)] for s in range(2)]
    model, pipe = make(schedule=orders)
    with pipe:
        for _ in range(5):
            x, y = batch()
            plain = twin(model)
            model.zero_grad()
            assert torch.equal(pipe.step(x, target=y), reference_step(plain, x, y, 4, F.mse_loss))
            assert_same_gradients(model, gradients(plain))
        assert pipe.graph.captured == 1 and gpu.launches == 3


def test_what_a_step_gave_back_is_not_written_by_the_next(gpu):
    model, pipe = make()
    with pipe:
        kept = []
        for _ in range(5):
            x, y = batch()
            model.zero_grad()
            losses = []
            loss, out = pipe.step(x, target=y, losses=losses, return_outputs=True)
            kept.append((x, y, loss, out, losses, twin(model)))
        for x, y, loss, out, losses, plain in kept:
            assert torch.equal(loss, reference_step(plain, x, y, 4, F.mse_loss))
            assert torch.equal(out, torch.cat([plain(a) for a in x.tensor_split(4)]))
            assert torch.equal(losses[0], F.mse_loss(plain(x[:2]), y[:2]))


def test_gradients_add_up_and_optimizers_step_between_graphs(gpu):
    model, pipe = make()
    plain = twin(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (model, plain)]
    with pipe:
        for number in range(10):
            x, y = batch()
            if number % 2 == 0:
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=number % 4 == 0)
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            assert_same_gradients(model, gradients(plain))
            if number % 2:
                for optimizer in optimizers:
                    optimizer.step()
        assert gpu.launches >= 4
        # The user's own gradients are added to, too.
        mine = [torch.randn_like(p) for p in model.parameters()]
        for p, q, grad in zip(model.parameters(), plain.parameters(), mine):
            p.grad, q.grad = grad.clone(), grad.clone()
        before = gpu.launches
        pipe.step(x, target=y)
        reference_step(plain, x, y, 4, F.mse_loss)
        assert gpu.launches == before + 1
        assert_same_gradients(model, gradients(plain))


def test_new_shapes_modes_and_memory_are_captured_anew(gpu):
    model, pipe = make()
    plain = twin(model)

    def steps(rows, expected):
        for _ in range(3):
            x, y = batch(rows)
            model.zero_grad()
            plain.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            assert_same_gradients(model, gradients(plain))
        assert pipe.graph.captured == expected

    with pipe:
        steps(8, 1)
        steps(9, 2)
        steps(8, 2)
        model.eval()
        steps(8, 3)
        model.train()
        with torch.no_grad():
            for m in (model, plain):
                m[0][0].weight.data = torch.ones(6, 6)
        steps(8, 4)
        model[1].requires_grad_(False)
        plain[1].requires_grad_(False)
        steps(8, 5)


def test_dropout_draws_anew_in_each_replay(gpu):
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6))
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss, graphs=True) as pipe:
        x, y = batch(40)
        found = {pipe.step(x, target=y).item() for _ in range(6)}
    assert gpu.launches == 3 and len(found) == 6


def test_an_optimizer_inside_the_graph(gpu):
    model, _ = make(graphs=False)
    plain = copy.deepcopy(model)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.5) for m in (model, plain))
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, graphs=True, optimizer=mine) as pipe:
        for number in range(8):
            if number == 5:
                for optimizer in (mine, theirs):
                    optimizer.param_groups[0]["lr"] = 0.05  # is in the graph
            x, y = batch()
            mine.zero_grad()
            theirs.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            theirs.step()
            assert all(map(torch.equal, model.parameters(), plain.parameters()))
        assert pipe.graph.captured == 2


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"devices": ["cpu"] * 2}, "the ranks are on the CPU"),
    ],
    ids=str,
)
def test_what_no_graph_can_hold_runs_eagerly_and_says_why(gpu, capsys, options, reason):
    model, pipe = make(**options)
    assert f"graphs=True: steps run eagerly because {reason}" in capsys.readouterr().out
    plain = twin(model)
    with pipe:
        for _ in range(4):
            x, y = batch()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
        assert_same_gradients(model, gradients(plain))
        assert gpu.launches == 0 and reason in pipe.graph.fallback


def test_several_gpus_run_eagerly(standin, monkeypatch, capsys):
    install(monkeypatch, standin, devices=2)
    _, pipe = make()
    pipe.close()
    assert "the ranks are on several GPUs" in capsys.readouterr().out


def test_an_optimizer_that_no_graph_can_hold(gpu, capsys):
    model, pipe = make()
    pipe.close()
    optimizer = torch.optim.Adam(model.parameters())
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, graphs=True, optimizer=optimizer) as pipe:
        assert pipe.graph.fallback == "Adam is neither torch's SGD nor made with capturable=True"


def test_an_input_that_requires_a_gradient_runs_eagerly(gpu):
    _model, pipe = make()
    with pipe:
        for _ in range(4):
            x, y = batch()
            pipe.step(x, target=y)
        x.requires_grad_()
        pipe.step(x, target=y)
        assert x.grad is not None and gpu.launches > 0
        assert pipe.graph.fallback == "an input requires a gradient"


@pytest.mark.filterwarnings("ignore:.*post-accumulate-grad hooks")
def test_a_hook_on_a_complete_gradient_runs_eagerly(gpu):
    model, pipe = make()
    calls = []
    with pipe:
        for step in range(6):
            if step == 4:
                next(iter(model.parameters())).register_post_accumulate_grad_hook(lambda p: calls.append(p))
            x, y = batch()
            pipe.step(x, target=y)
        assert len(calls) == 2 and gpu.launches > 0
        assert pipe.graph.fallback.startswith("a parameter has a post-accumulate-grad hook")


def test_an_input_that_cannot_be_compared_runs_eagerly(gpu):
    class Scale:
        def __repr__(self):
            return "Scale"

    class Scaled(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * scale.value

    scale, (x, y) = Scale(), batch()
    with pe.Pipeline([Scaled(6, 6)], microbatches=2, loss_fn=F.mse_loss, graphs=True) as pipe:
        for scale.value in range(5):
            loss = pipe.step(x, scale, target=y)
            if scale.value == 0:
                assert torch.allclose(loss, (y * y).mean())
        assert "an input is a Scale, which cannot be compared" in pipe.graph.fallback


class Block(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.linear = nn.Linear(6, 6, bias)

    def forward(self, x):
        return self.linear(x).tanh()


def replace_parameter(model):
    model[0].linear.weight = nn.Parameter(torch.randn(6, 6))


def replace_layer(model):
    model[0].linear = nn.Linear(6, 6)


def replace_by_loading(model):
    model.load_state_dict({k: torch.randn_like(v) for k, v in model.state_dict().items()}, assign=True)


def add_bias(model):
    model[3].linear.bias = nn.Parameter(torch.randn(6))


@pytest.mark.parametrize("replace", [replace_parameter, replace_layer, replace_by_loading, add_bias])
@pytest.mark.parametrize("graphs", [False, True])
def test_what_is_replaced_in_a_model_is_noticed(gpu, replace, graphs):
    model = nn.Sequential(Block(), Block(), Block(), Block(bias=False))
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, graphs=graphs) as pipe:
        for number in range(8):
            if number == 4:
                replace(model)
            x, y = batch()
            plain = twin(model)
            model.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            assert_same_gradients(model, gradients(plain))
        assert not graphs or pipe.graph.captured == 2


@pytest.mark.parametrize("change", ["clear", "replace", "rate"])
def test_an_optimizers_state_and_settings_are_noticed(gpu, change):
    model, pipe = make()
    pipe.close()
    plain = copy.deepcopy(model)
    rate = torch.tensor(0.1)
    both = [torch.optim.SGD(m.parameters(), lr=rate.clone(), momentum=0.5) for m in (model, plain)]
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, graphs=True, optimizer=both[0]) as pipe:
        for number in range(10):
            if number == 5:
                for optimizer in both:
                    if change == "clear":
                        optimizer.state.clear()
                    elif change == "replace":
                        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                    else:
                        optimizer.param_groups[0]["lr"].fill_(0.5)
            x, y = batch()
            for optimizer in both:
                optimizer.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            both[1].step()
            assert all(map(torch.equal, model.parameters(), plain.parameters()))
        assert pipe.graph.captured == 2


def test_a_batch_that_is_refused_is_no_reason_against_graphs(gpu):
    model, pipe = make()
    with pipe:
        for number in range(7):
            x, y = batch()
            if number in (0, 1, 4):
                with pytest.raises(pe.InvalidArgument, match="target has 7 rows"):
                    pipe.step(x, target=y[:7])
            model.zero_grad()
            pipe.step(x, target=y)
            assert gpu.launches == max(0, number - 1)
        assert pipe.graph.fallback is None


def test_batch_norms_statistics_advance_with_each_replay(gpu):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    plain = twin(model)
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss, graphs=True) as pipe:
        for _ in range(6):
            x, y = batch()
            model.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 2, F.mse_loss)
            assert all(map(torch.equal, model.buffers(), plain.buffers()))
            plain.zero_grad()
        assert gpu.launches == 4
    copy.deepcopy(model)  # no hook of ours stands in the way


class Syncs(nn.Module):
    """Does what no capture allows."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def forward(self, x):
        if self.gpu.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x


def test_a_step_that_cannot_be_captured_runs_eagerly_with_nothing_lost(gpu, standin, capsys):
    model = nn.Sequential(nn.Linear(6, 6), Syncs(gpu), nn.Linear(6, 6))
    plain = nn.Sequential(*(copy.deepcopy(layer) for layer in (model[0], model[2])))
    gc.collect()
    before = standin.live()
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, graphs=True) as pipe:
        for _ in range(6):
            x, y = batch()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters()))
        assert gpu.launches == 0
        assert "RuntimeError: operation not permitted when stream is capturing" in pipe.graph.fallback
    assert "steps run eagerly because the step cannot be captured" in capsys.readouterr().out
    assert all(standin.live()[kind] == before[kind] for kind in ("graph", "graph_exec"))


def test_a_launch_that_fails_leaves_no_gradients(gpu, standin):
    model, pipe = make(trace=False)
    with pipe:
        x, y = batch()
        for _ in range(3):
            model.zero_grad()
            pipe.step(x, target=y)
        standin.reset(1)
        model.zero_grad()
        standin.fail_at(7, 2)
        with pytest.raises(RuntimeError, match="CUDA error 2"):
            pipe.step(x, target=y)
        assert [call.name for call in standin.log()][7] == "cuGraphLaunch"
        assert all(p.grad is None for p in model.parameters())
        plain = twin(model)
        pipe.step(x, target=y)
        reference_step(plain, x, y, 4, F.mse_loss)
        assert_same_gradients(model, gradients(plain))


def test_steps_that_all_differ_run_eagerly_at_last(gpu, capsys):
    model, pipe = make()
    with pipe:
        for rows in range(4, 30):
            x, y = batch(rows)
            model.zero_grad()
            pipe.step(x, target=y)
        assert "too many steps differ from one another" in pipe.graph.fallback


def test_a_step_with_times_is_a_second_graph(gpu):
    model, pipe = make()
    with pipe:
        for _ in range(4):
            model.zero_grad()
            pipe.step(*batch()[:1], target=batch()[1])
        first = pipe.trace
        assert len(first.tasks) == 16 and pipe.graph.captured == 1
        assert all(0 <= task.begin <= task.end for task in first.tasks)
        begins = [task.begin for task in first.tasks]
        for _ in range(2):
            model.zero_grad()
            pipe.step(*batch()[:1], target=batch()[1])
        assert [task.begin for task in first.tasks] == begins  # it is of its own step
        assert [task.begin for task in pipe.trace.tasks] != begins
        pipe.tracing = False
        for _ in range(3):
            model.zero_grad()
            pipe.step(*batch()[:1], target=batch()[1])
        assert pipe.graph.captured == 2
        with pytest.raises(pe.PipelineError, match="tracing"):
            pipe.trace  # noqa: B018


def test_a_step_is_one_launch_and_asks_the_driver_little_else(gpu, standin):
    model, pipe = make(stages=4, microbatches=16, trace=False)
    with pipe:
        x, y = batch(16)
        for _ in range(3):
            model.zero_grad()
            pipe.step(x, target=y)
        standin.reset(1)
        model.zero_grad()
        pipe.step(x, target=y)
        names = [call.name for call in standin.log() if not call.name.startswith("cuCtx")]
        own = [name for name in names if "PrimaryCtx" not in name and "CaptureMode" not in name]
        assert own == ["cuEventQuery", "cuGraphLaunch", "cuEventRecordWithFlags"]


def test_the_graph_has_the_edges_of_the_plan_and_backwards_go_first(gpu, standin):
    model, pipe = make(stages=2, microbatches=4, trace=False)
    with pipe:
        for _ in range(2):
            model.zero_grad()
            pipe.step(*batch()[:1], target=batch()[1])
        standin.reset(1)
        model.zero_grad()
        pipe.step(*batch()[:1], target=batch()[1])
        from device_log import Order

        log = standin.log()
        begin = next(i for i, call in enumerate(log) if call.name == "cuStreamBeginCapture")
        end = next(i for i, call in enumerate(log) if call.name == "cuStreamEndCapture")
        order = Order(log[begin:end], caller=log[begin].args["stream"])
        streams, plan = pipe._routes.train.layout.streams, pipe.plan
        assert len(order.before) == len(plan) == len(order.at_end)
        for task in range(len(plan)):
            for after in plan.successors(task):
                assert streams.op_of(task) in order.before[streams.op_of(after)]
        assert "cuEventQuery" not in order.calls  # it would spoil the capture


def test_training_takes_times_of_its_last_steps_alone(gpu, tmp_path):
    from pipeline_ext.lm.corpus import Corpus
    from pipeline_ext.lm.gpt import gpt, loss_fn
    from pipeline_ext.lm.training import Training

    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    model = gpt(context=16, width=16, layers=2, heads=2)
    with pe.Pipeline(model, 2, 4, loss_fn=loss_fn, graphs=True) as pipe:
        training = Training(
            model, pipe, Corpus(str(text), 16), schedule="1f1b", steps=9, batch=8, learning_rate=1e-3, seed=0
        )
        steps = list(training.run(tmp_path / "metrics.jsonl"))
        assert [step.bubble is not None for step in steps] == [False] * 5 + [True] * 4
        assert gpu.launches == 3 + 2 and pipe.graph.fallback is None
        assert steps[-1].loss < steps[0].loss
        assert 0 < training.summary.bubble_measured < 1
