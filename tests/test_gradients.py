"""Gradients and loss equal plain autograd's, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from models import chain, tree, tree_batch, tree_loss
from reference import assert_same_gradients, gradients, reference_step, twin

import pipeline_ext as pe
from pipeline_ext import _C

SCHEDULES = ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zbv"]  # test_every_schedule runs the others


def shapes():
    for schedule in SCHEDULES:
        layout = _C.layout_of(schedule)
        for stages in (2, 4) if layout == "v" else (1, 2, 3, 4):
            yield schedule, stages, ["cpu"] if layout == "looped" and stages == 3 else None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("schedule, stages, devices", list(shapes()))
@pytest.mark.parametrize("make", [chain, tree], ids=["chain", "tree"])
def test_equal_to_plain_autograd(make, schedule, stages, devices, overlap, threads, repeats):
    torch.set_num_threads(threads)
    for microbatches in range(1, 10):
        rows = 2 * microbatches + microbatches // 2  # uneven from two microbatches on
        if make is chain:
            x, y, loss_fn = torch.randn(rows, 12), torch.randn(rows, 12), F.mse_loss
        else:
            (x, y), loss_fn = tree_batch(rows), tree_loss
        model = make()
        plain = twin(model)
        expected_loss = reference_step(plain, x, y, microbatches, loss_fn)
        expected = gradients(plain)
        with pe.Pipeline(
            model,
            num_stages=stages,
            microbatches=microbatches,
            schedule=schedule,
            loss_fn=loss_fn,
            devices=devices,
            overlap=overlap,
        ) as pipe:
            for _ in range(repeats):
                model.zero_grad()
                # The tree's first stage takes a tuple as its one argument.
                assert torch.equal(pipe.step(x, target=y), expected_loss)
                assert_same_gradients(model, expected)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b"])
@pytest.mark.parametrize("reactive", [False, True])
def test_static_and_reactive_agree(schedule, reactive, repeats):
    model, x, y = chain(), torch.randn(9, 12), torch.randn(9, 12)
    plain = twin(model)
    reference_step(plain, x, y, 7, F.mse_loss)
    with pe.Pipeline(model, 4, 7, schedule, F.mse_loss, reactive=reactive) as pipe:
        for _ in range(repeats):
            model.zero_grad()
            pipe.step(x, target=y)
            assert_same_gradients(model, gradients(plain))


def test_loss_reduction_sum():
    def loss_fn(out, target):
        return F.mse_loss(out, target, reduction="sum")

    model, x, y = chain(), torch.randn(7, 12), torch.randn(7, 12)
    plain = twin(model)
    expected_loss = reference_step(plain, x, y, 3, loss_fn, reduction="sum")
    with pe.Pipeline(model, 2, 3, loss_fn=loss_fn, loss_reduction="sum") as pipe:
        assert torch.equal(pipe.step(x, target=y), expected_loss)
    assert_same_gradients(model, gradients(plain))


def test_gradients_accumulate_over_steps_and_zero_grad_works_both_ways():
    model, plain = chain(), None
    plain = twin(model)
    batches = [(torch.randn(6, 12), torch.randn(6, 12)) for _ in range(3)]
    with pe.Pipeline(model, 3, 3, loss_fn=F.mse_loss) as pipe:
        for set_to_none in (True, False, True):
            for m in (model, plain):
                m.zero_grad(set_to_none=set_to_none)
            for x, y in batches:
                reference_step(plain, x, y, 3, F.mse_loss)
                pipe.step(x, target=y)
            assert_same_gradients(model, gradients(plain))


def test_kept_gradients_are_not_overwritten_by_later_steps():
    # A gradient's memory is handed to .grad without a copy; it must be nobody else's.
    model, x, y = chain(), torch.randn(6, 12), torch.randn(6, 12)
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
        kept = [p.grad for p in model.parameters()]
        copies = [g.clone() for g in kept]
        model.zero_grad()
        pipe.step(torch.randn(6, 12), target=y)
        assert all(map(torch.equal, kept, copies))


class AddTable(torch.nn.Module):
    """Adding a parameter of the input's own shape: both gradients are one tensor."""

    def __init__(self, rows):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(rows, 4))
        self.b = torch.nn.Parameter(torch.randn(rows, 4))

    def forward(self, x):
        return x + self.a + self.b


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_gradients_that_are_one_tensor_are_not_added_twice(stages, repeats):
    model = torch.nn.Sequential(AddTable(2), AddTable(2), AddTable(2))
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    plain = twin(model)
    reference_step(plain, x, y, 4, F.mse_loss)
    with pe.Pipeline(model, stages, 4, loss_fn=F.mse_loss) as pipe:
        for _ in range(repeats):
            model.zero_grad()
            pipe.step(x, target=y)
            assert_same_gradients(model, gradients(plain))


class AddFlat(torch.nn.Module):
    """The parameter's gradient is a view of the input's."""

    def __init__(self, rows):
        super().__init__()
        self.flat = torch.nn.Parameter(torch.randn(rows * 4))

    def forward(self, x):
        return x + self.flat.view_as(x)


def test_a_gradient_on_its_way_back_shares_no_memory_with_a_parameters(repeats):
    # Plain accumulation is no reference here: torch 2.13 lets the three gradients share memory and adds
    # each microbatch to it three times.
    model = torch.nn.Sequential(AddFlat(2), AddFlat(2), AddFlat(2))
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    plain = twin(model)
    expected = [torch.zeros(8) for _ in range(3)]
    for a, b in zip(x.tensor_split(4), y.tensor_split(4)):
        loss = F.mse_loss(plain(a), b) * (2 / 8)
        for total, grad in zip(expected, torch.autograd.grad(loss, list(plain.parameters()))):
            total += grad
    with pe.Pipeline(model, 3, 4, loss_fn=F.mse_loss) as pipe:
        for _ in range(repeats):
            model.zero_grad()
            pipe.step(x, target=y)
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected))


class Patches(torch.nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class Last(torch.nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.lstm = torch.nn.LSTM(*sizes, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


def test_gradients_keep_their_memory_layout_at_a_cut():
    # What stands before a cut may sum in another order if its gradient comes in another layout.
    nn = torch.nn
    patches = nn.Sequential(nn.Conv2d(3, 32, 4, 4), nn.BatchNorm2d(32), Patches(), nn.Linear(32, 8))
    images = torch.randn(8, 3, 32, 32), torch.randn(8, 64, 8)
    recurrent = nn.Sequential(Last(16, 24), nn.Linear(24, 24), Last(24, 8))
    sequences = torch.randn(8, 12, 16), torch.randn(8, 12, 8)
    for model, (x, y) in ((patches, images), (recurrent, sequences)):
        plain = twin(model)
        reference_step(plain, x, y, 4, F.mse_loss)
        for cuts in ([1], [2], [1, 2]):
            model.zero_grad()
            with pe.Pipeline(model, None, 4, loss_fn=F.mse_loss, cuts=cuts) as pipe:
                pipe.step(x, target=y)
            assert_same_gradients(model, gradients(plain))


def test_one_tensor_handed_on_several_times():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x):
            if isinstance(x, tuple):
                x = x[0].tanh() + x[1].sigmoid() * x[2].exp()
            h = self.linear(x)
            return h, h, h

    model = torch.nn.Sequential(Twice(), Twice(), Twice())
    x, y = torch.randn(12, 8), torch.randn(12, 8)

    def loss_fn(out, target):
        return F.mse_loss(out[0] * out[1], target) + out[2].mean()

    plain = twin(model)
    reference_step(plain, x, y, 4, loss_fn)
    with pe.Pipeline(model, 3, 4, loss_fn=loss_fn) as pipe:
        pipe.step(x, target=y)
    assert_same_gradients(model, gradients(plain))


def test_inputs_that_require_a_gradient_get_theirs():
    encoder, model = torch.nn.Linear(12, 12), chain()
    x, y = torch.randn(7, 12), torch.randn(7, 12)
    plain_encoder, plain = twin(encoder), twin(model)
    hidden = plain_encoder(x)
    for a, b in zip(hidden.tensor_split(3), y.tensor_split(3)):
        (F.mse_loss(plain(a), b) * (len(a) / 7)).backward(retain_graph=True)
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss) as pipe:
        pipe.step(encoder(x), target=y)
    assert_same_gradients(model, gradients(plain))
    for p, q in zip(encoder.parameters(), plain_encoder.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_outputs_and_losses_on_request():
    model, x, y = chain(), torch.randn(7, 12), torch.randn(7, 12)
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss) as pipe:
        losses = ["stale"]
        loss, out = pipe.step(x, target=y, losses=losses, return_outputs=True)
        parts = x.tensor_split(3)
        expected = [model(a) for a in parts]
        assert torch.equal(out, torch.cat(expected)) and not out.requires_grad
        for found, a, b in zip(losses, expected, y.tensor_split(3), strict=True):
            assert torch.equal(found, F.mse_loss(a, b))
        assert not loss.requires_grad and loss.shape == ()
        assert torch.equal(pipe.eval(x), torch.cat(expected))
        assert torch.equal(pipe.eval(x[:2]), torch.cat([model(x[:1]), model(x[1:2])]))
