"""Gradients and losses of ranks on streams: those of plain autograd, bit for bit, whatever the layout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import AtOnce, chain, tree, tree_batch, tree_loss
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe

CASES = [
    ("gpipe", 2, ["cuda:0"] * 2, {}),
    ("1f1b", 4, ["cuda:0"] * 4, {}),
    ("1f1b", 3, ["cuda:0", "cuda:1", "cuda:0"], {}),
    ("1f1b", 4, None, {"overlap": False}),
    ("interleaved-1f1b", 4, ["cuda:0", "cuda:1"], {}),
    ("interleaved-1f1b", 4, ["cuda:1"], {"overlap": False}),
    ("1f1b", 2, None, {"pack": 2, "pack_forward": 3}),
    ("1f1b", 4, ["cuda:0"] * 4, {"pack": "all"}),
    ("gpipe", 2, ["cuda:0"] * 2, {"pack": 2, "reactive": False}),
]


# Each W after the I of the next microbatch, but for a stage that lists B.
SPLIT = [
    ["0F0", "0F1", "0F2", "0F3", "0I0", "0I1", "0W0", "0I2", "0W1", "0I3", "0W2", "0W3"],
    ["1F0", "1F1", "1I0", "1F2", "1I1", "1W0", "1F3", "1I2", "1W1", "1I3", "1W2", "1W3"],
    ["2F0", "2B0", "2F1", "2I1", "2W1", "2F2", "2B2", "2F3", "2I3", "2W3"],
]
SPLIT_CASES = [
    (["cuda:0"] * 3, {}),
    (["cuda:0"] * 3, {"overlap": False}),
    (["cuda:0"] * 3, {"reactive": False}),
    (["cuda:0", "cuda:1", "cuda:0"], {}),
    (["cuda:0", "cuda:1", "cuda:0"], {"pack": 2, "pack_forward": 2}),
    (["cuda:0"] * 3, {"pack": "all"}),
]


def case(make, microbatches):
    rows = 2 * microbatches + microbatches // 2
    if make is chain:
        return chain(), torch.randn(rows, 12), torch.randn(rows, 12), F.mse_loss
    (x, y) = tree_batch(rows)
    return tree(), x, y, tree_loss


@pytest.mark.parametrize("schedule, stages, devices, options", CASES, ids=str)
@pytest.mark.parametrize("make", [chain, tree], ids=["chain", "tree"])
def test_equal_to_plain_autograd(gpus, make, schedule, stages, devices, options):
    for microbatches in (1, 4, 7):
        if isinstance(options.get("pack"), int) and microbatches < 3:
            continue
        model, x, y, loss_fn = case(make, microbatches)
        plain = twin(model)
        expected_loss = reference_step(plain, x, y, microbatches, loss_fn)
        with pe.Pipeline(model, stages, microbatches, schedule, loss_fn, devices=devices, **options) as pipe:
            for _ in range(2):
                model.zero_grad()
                losses = []
                assert torch.equal(pipe.step(x, target=y, losses=losses), expected_loss)
                assert_same_gradients(model, gradients(plain))
                assert len(losses) == microbatches


@pytest.mark.parametrize("devices, options", SPLIT_CASES, ids=str)
@pytest.mark.parametrize("make", [chain, tree, AtOnce], ids=["chain", "tree", "at once"])
def test_backwards_in_two_parts_are_equal_too(gpus, make, devices, options):
    model, x, y, loss_fn = case(chain if make is AtOnce else make, 4)
    if make is AtOnce:
        model = nn.Sequential(*(AtOnce() for _ in range(3)))
    plain = twin(model)
    with pe.Pipeline(model, 3, 4, SPLIT, loss_fn, devices=devices, **options) as pipe:
        for _ in range(3):
            expected = reference_step(plain, x, y, 4, loss_fn)
            assert torch.equal(pipe.step(x, target=y), expected)
            assert_same_gradients(model, gradients(plain))
        assert pipe.unsplit_stages.keys() == ({1, 2} if make is AtOnce else set())


def test_weight_gradients_of_large_stages_are_added_as_they_come(gpus, monkeypatch):
    from pipeline_ext.engines.cuda import parameters

    monkeypatch.setattr(parameters, "_LARGE", 0)
    for make in (chain, AtOnce):
        test_backwards_in_two_parts_are_equal_too(gpus, make, ["cuda:0"] * 3, {})


def test_gradients_add_up_over_steps(gpus):
    model, x, y, loss_fn = case(chain, 4)
    plain = twin(model)
    with pe.Pipeline(model, 2, 4, loss_fn=loss_fn) as pipe:
        for _ in range(3):
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, loss_fn)
            assert_same_gradients(model, gradients(plain))


def test_gradients_of_large_stages_are_added_as_they_come(gpus, monkeypatch):
    from pipeline_ext.engines.cuda import parameters

    monkeypatch.setattr(parameters, "_LARGE", 0)
    test_gradients_add_up_over_steps(gpus)


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float8_e5m2])
def test_other_types_on_the_wire_give_what_they_give_on_the_cpu(gpus, wire):
    model, x, y, loss_fn = case(chain, 6)
    found = []
    for devices in (["cpu"] * 2, ["cuda:0"] * 2, ["cuda:0", "cuda:1"]):
        stages = copy.deepcopy(model)
        with pe.Pipeline(
            stages, 2, 6, loss_fn=loss_fn, devices=devices, wire=wire, wire_forward=torch.bfloat16, pack=2
        ) as pipe:
            pipe.step(x, target=y)
            found.append(gradients(stages))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_hold_the_aliases_in_their_own_list_too(gpus, layer):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = layer(6, 6, num_layers=2, batch_first=True)

        def forward(self, x):
            assert not self.inner._weights_have_changed()
            return self.inner(x)[0]

    model, x = nn.Sequential(Recurrent(), Recurrent()), torch.randn(6, 4, 6)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss) as pipe:
        for _ in range(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            assert torch.equal(pipe.step(x, target=x), reference_step(plain, x, x, 3, F.mse_loss))
            assert_same_gradients(model, gradients(plain))
            for optimizer in optimizers:
                optimizer.step()
        assert not model[0].inner._weights_have_changed()


def test_an_optimizer_given_to_the_pipeline_steps_at_the_end_of_each_step(gpus):
    model, x, y, loss_fn = case(chain, 4)
    plain = twin(model)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, plain))
    with pe.Pipeline(model, 2, 4, loss_fn=loss_fn, optimizer=mine) as pipe:
        for _ in range(3):
            mine.zero_grad()
            theirs.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, loss_fn)
            theirs.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_by_default_ranks_spread_over_all_gpus(gpus):
    model, *_ = case(chain, 4)
    with pe.Pipeline(model, 4, 4, loss_fn=F.mse_loss) as pipe:
        assert pipe.devices == [torch.device("cuda", i) for i in (0, 0, 1, 1)]
        assert pipe.plan.overlap
    with pe.Pipeline(model, 1, 4, loss_fn=F.mse_loss) as pipe:
        assert pipe.devices == [torch.device("cuda", 0)]
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, devices=["cpu"] * 2) as pipe:
        assert pipe.devices == [torch.device("cpu")] * 2
        assert not pipe.plan.overlap


def test_times_are_those_of_the_devices(gpus, tmp_path):
    model, x, y, loss_fn = case(chain, 6)
    with pe.Pipeline(model, 2, 6, loss_fn=loss_fn, devices=["cuda:0", "cuda:1"]) as pipe:
        pipe.step(x, target=y)
        trace = pipe.trace
        pipe.step(x, target=y)  # its events are others
        assert len(trace.tasks) == 24
        end = {task.task: task.end for task in trace.tasks}
        for task in trace.tasks:
            assert 0 <= task.begin <= task.end <= trace.step_time
            for after in pipe.plan.successors(task.task):
                same = pipe.plan.describe(after)[3] == task.rank
                begin = next(t.begin for t in trace.tasks if t.task == after)
                assert not same or begin >= end[task.task]
        trace.save(tmp_path / "trace.json")
        assert 0 <= trace.bubble < 1
        assert pipe.simulate().makespan > 0
        pipe.tracing = False
        pipe.step(x, target=y)
        with pytest.raises(pe.PipelineError, match="set tracing=True"):
            pipe.trace  # noqa: B018


def test_an_evaluation_and_outputs(gpus):
    model, x, y, loss_fn = case(chain, 5)
    plain = twin(model)
    with pe.Pipeline(model, 4, 5, loss_fn=loss_fn) as pipe:
        _, outputs = pipe.step(x, target=y, return_outputs=True)
        expected = torch.cat([plain(a) for a in x.tensor_split(5)])
        assert torch.equal(outputs, expected)
        assert torch.equal(pipe.eval(x), expected)
        assert torch.equal(pipe.eval(x[:3]), torch.cat([plain(a) for a in x[:3].tensor_split(3)]))


class Noise(nn.Linear):
    """Draws from the GPU's generator, as a kernel would, and from the CPU's."""

    gpus = None

    def forward(self, x):
        drawn = self.gpus.generators[0].rand_like(x) + self.gpus.generators[0].rand_like(x)
        return super().forward(x) * drawn + torch.rand(1)


def test_stages_draw_the_same_whatever_the_schedule(gpus):
    Noise.gpus = gpus
    torch.manual_seed(0)
    model, x, y = nn.Sequential(*(Noise(6, 6) for _ in range(4))), torch.randn(8, 6), torch.randn(8, 6)
    gpus.generators[0].manual_seed(5)
    gpus.generators[0].rand_like(x)
    found = []
    for schedule, ranks, overlap in (("1f1b", 4, True), ("gpipe", 4, False), ("interleaved-1f1b", 2, True)):
        torch.manual_seed(1)
        options = {"devices": ["cuda:0"] * ranks, "overlap": overlap}
        with pe.Pipeline(model, 4, 4, schedule, F.mse_loss, **options) as pipe:
            for _ in range(2):
                model.zero_grad()
                found.append((pipe.step(x, target=y), gradients(model)))
    for (loss, grads), (expected, wanted) in zip(found[2:], found):
        assert torch.equal(loss, expected)
        assert all(torch.equal(grads[name], wanted[name]) for name in wanted)
    assert not torch.equal(found[0][0], found[1][0])
    assert gpus.generators[0].get_state() == (5, 4)  # the caller's, as before
