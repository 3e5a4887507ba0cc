"""What people do with models and optimizers keeps working."""

import time

import pytest
import torch
import torch.nn.functional as F
from models import Residual, chain
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

MODES = pytest.mark.parametrize("overlap", [False, True])


def check(model, x, y, microbatches=4, stages=2, loss_fn=F.mse_loss, **options):
    """One step of the model beside the reference; returns the pipeline's loss."""
    plain = twin(model)
    expected_loss = reference_step(plain, x, y, microbatches, loss_fn)
    with pe.Pipeline(model, stages, microbatches, loss_fn=loss_fn, **options) as pipe:
        for _ in range(5):
            model.zero_grad()
            loss = pipe.step(x, target=y)
            assert torch.equal(loss, expected_loss)
            assert_same_gradients(model, gradients(plain))
    return loss


class Checkpointed(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@MODES
def test_activation_checkpointing(overlap):
    model = nn.Sequential(*(Checkpointed(Residual(8)) for _ in range(4)))
    check(model, torch.randn(9, 8), torch.randn(9, 8), overlap=overlap)


@MODES
def test_frozen_parameters(overlap):
    for frozen in range(4):
        model = nn.Sequential(*(Residual(8) for _ in range(4)))
        model[frozen].requires_grad_(False)
        check(model, torch.randn(9, 8), torch.randn(9, 8), stages=4, overlap=overlap)


def test_a_frozen_first_half_leaves_the_rest_its_gradients():
    model = nn.Sequential(*(Residual(8) for _ in range(4)))
    model[:2].requires_grad_(False)
    check(model, torch.randn(8, 8), torch.randn(8, 8))


class Skipping(nn.Module):
    """Holds a parameter that a step may not reach."""

    def __init__(self, width):
        super().__init__()
        self.used = nn.Linear(width, width)
        self.unused = nn.Linear(width, width)

    def forward(self, x):
        return self.used(x)


def test_a_parameter_that_is_not_reached_keeps_no_gradient():
    model = nn.Sequential(*(Skipping(8) for _ in range(4)))
    check(model, torch.randn(8, 8), torch.randn(8, 8))
    assert model[0].unused.weight.grad is None


@MODES
def test_batch_norm_and_its_running_statistics(overlap):
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    plain = twin(model)
    x, y = torch.randn(12, 6), torch.randn(12, 6)
    reference_step(plain, x, y, 3, F.mse_loss)
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss, overlap=overlap) as pipe:
        pipe.step(x, target=y)
        assert_same_gradients(model, gradients(plain))
        for a, b in zip(model.buffers(), plain.buffers()):
            assert torch.equal(a, b)
        model.eval()
        plain.eval()
        before = [b.clone() for b in model.buffers()]
        assert torch.equal(pipe.eval(x), torch.cat([plain(a) for a in x.tensor_split(3)]))
        assert all(map(torch.equal, model.buffers(), before))


def test_recomputed_batch_norm_is_refused_where_it_would_race():
    model = nn.Sequential(*(Checkpointed(nn.BatchNorm1d(4)) for _ in range(2)))
    x = torch.randn(8, 4)
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss, overlap=True) as pipe:
        with pytest.raises(pe.StageError, match="batch norm is recomputed.*overlap=False"):
            pipe.step(x, target=x)
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=x)


def test_train_and_eval_mode_are_the_users():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(1.0), nn.Linear(4, 4))
    x = torch.randn(4, 4)
    with pe.Pipeline(model, 2, 2) as pipe:
        assert torch.equal(pipe.eval(x, keep_mode=True), model[2](torch.zeros(4, 4)))
        model.eval()
        assert torch.equal(pipe.eval(x), torch.cat([model(a) for a in x.tensor_split(2)]))


@pytest.mark.parametrize("before", [True, False])
def test_optimizers_made_before_or_after_wrapping(before):
    model = chain()
    plain = twin(model)
    other = torch.optim.AdamW(plain.parameters())
    if before:
        optimizer = torch.optim.AdamW(model.parameters())
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        if not before:
            optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(5):
            x, y = torch.randn(8, 12), torch.randn(8, 12)
            optimizer.zero_grad()
            other.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            optimizer.step()
            other.step()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p, q)


def test_several_pipelines_at_once():
    models = [chain() for _ in range(3)]
    x, y = torch.randn(8, 12), torch.randn(8, 12)
    pipes = [pe.Pipeline(m, 2, 4, loss_fn=F.mse_loss) for m in models]
    for _ in range(3):
        for model, pipe in zip(models, pipes):
            plain = twin(model)
            reference_step(plain, x, y, 4, F.mse_loss)
            model.zero_grad()
            pipe.step(x, target=y)
            assert_same_gradients(model, gradients(plain))
    for pipe in pipes:
        pipe.close()


def test_one_model_in_two_pipelines():
    model, x, y = chain(), torch.randn(8, 12), torch.randn(8, 12)
    plain = twin(model)
    reference_step(plain, x, y, 4, F.mse_loss)
    reference_step(plain, x, y, 2, F.mse_loss)
    with (
        pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as one,
        pe.Pipeline(model, 4, 2, "gpipe", F.mse_loss) as two,
    ):
        one.step(x, target=y)
        two.step(x, target=y)
    assert_same_gradients(model, gradients(plain))


class Expert(nn.Module):
    """Returns an auxiliary loss beside its value, as a mixture of experts does."""

    def __init__(self, width, aux):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.aux = aux

    def forward(self, x):
        y = self.linear(x)
        return pe.WithLoss(y, y.square().mean() * 0.1) if self.aux else y


def test_auxiliary_losses_add_to_the_total():
    stages = [Expert(4, True), Expert(4, False), Expert(4, True)]
    plain = [twin(s) for s in stages]
    x, y = torch.randn(7, 4), torch.randn(7, 4)
    total = 0
    for a, b in zip(x.tensor_split(3), y.tensor_split(3)):
        h, extra = a, []
        for stage in plain:
            h = stage(h)
            if isinstance(h, pe.WithLoss):
                extra.append(h.loss)
                h = h.value
        loss = (F.mse_loss(h, b) + sum(extra)) * (len(a) / 7)
        loss.backward()
        total += loss.item()
    with pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss) as pipe:
        assert abs(pipe.step(x, target=y).item() - total) < 1e-6
        assert pipe.eval(x).shape == (7, 4)
    for stage, other in zip(stages, plain):
        for p, q in zip(stage.parameters(), other.parameters()):
            torch.testing.assert_close(p.grad, q.grad)


def test_tied_parameters_on_different_stages_are_summed():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6))
    model[3].weight = model[0].weight
    plain = twin(model)
    assert plain[3].weight is plain[0].weight
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    reference_step(plain, x, y, 4, F.mse_loss)
    sums = []
    with pe.Pipeline(model, 4, 4, loss_fn=F.mse_loss) as pipe:
        for _ in range(10):
            model.zero_grad()
            pipe.step(x, target=y)
            torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)
            assert torch.equal(model[2].weight.grad, plain[2].weight.grad)
            sums.append(model[0].weight.grad)
        assert all(torch.equal(total, sums[0]) for total in sums)  # whichever thread came first
        pipe.step(x, target=y)
        reference_step(plain, x, y, 4, F.mse_loss)
        torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)
    F.mse_loss(model(x), y).backward()  # the model's own backward is as it was
    F.mse_loss(plain(x), y).backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        time.sleep(0.0005)
        return self.inner(x)


def test_one_module_in_several_stages():
    inner = nn.Linear(4, 4)
    stages = [Wrapped(inner) for _ in range(3)]
    weight, plain = inner.weight, twin(nn.Sequential(*stages))
    x, y = torch.randn(16, 4), torch.randn(16, 4)
    reference_step(plain, x, y, 16, F.mse_loss)
    with pe.Pipeline(stages, microbatches=16, loss_fn=F.mse_loss) as pipe:
        for _ in range(10):
            inner.zero_grad()
            pipe.step(x, target=y)
            assert inner.weight is weight
            torch.testing.assert_close(weight.grad, plain[0].inner.weight.grad)


def test_tied_parameters_may_be_replaced():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
        model[0].weight = model[1].weight = nn.Parameter(torch.randn(4, 4))
        model.zero_grad()
        plain = twin(model)
        reference_step(plain, x, y, 2, F.mse_loss)
        pipe.step(x, target=y)
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad)


def test_a_sparse_and_a_dense_gradient_of_a_tied_parameter():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4, sparse=True)

        def forward(self, ids):
            return self.table(ids)

    model = nn.Sequential(Table(), nn.Linear(4, 9, bias=False))
    model[1].weight = model[0].table.weight
    plain = twin(model)
    ids, y = torch.randint(9, (6,)), torch.randint(9, (6,))
    reference_step(plain, ids, y, 3, F.cross_entropy)
    with pe.Pipeline(model, 2, 3, loss_fn=F.cross_entropy) as pipe:
        pipe.step(ids, target=y)
    torch.testing.assert_close(model[1].weight.grad, plain[1].weight.grad)


def test_a_loss_module_tied_to_an_early_stage():
    class Penalty(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

        def forward(self, out, target):
            return F.mse_loss(out, target) + self.weight.square().sum()

    model = chain()
    loss_fn = Penalty(model[0].weight)
    x, y = torch.randn(16, 12), torch.randn(16, 12)
    sums = []
    with pe.Pipeline(model, 2, 8, loss_fn=loss_fn) as pipe:
        for _ in range(20):
            model.zero_grad()
            pipe.step(x, target=y)
            sums.append(model[0].weight.grad)
    assert all(torch.equal(total, sums[0]) for total in sums)


def test_a_loss_module_is_trained_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, out, target):
            return F.mse_loss(out * self.scale, target)

    model, loss_fn = chain(), Scaled()
    plain, plain_loss = twin(model), twin(loss_fn)
    x, y = torch.randn(8, 12), torch.randn(8, 12)
    reference_step(plain, x, y, 4, plain_loss)
    with pe.Pipeline(model, 2, 4, loss_fn=loss_fn) as pipe:
        pipe.step(x, target=y)
    assert_same_gradients(loss_fn, gradients(plain_loss))


def test_parameters_reached_through_a_closure_get_their_gradients():
    model = chain()

    def penalty(parameters):
        return sum(p.square().sum() for p in parameters) * 1e-2

    plain = twin(model)
    x, y = torch.randn(8, 12), torch.randn(8, 12)
    reference_step(plain, x, y, 4, lambda a, b: F.mse_loss(a, b) + penalty(plain.parameters()))
    with pe.Pipeline(model, 2, 4, loss_fn=lambda a, b: F.mse_loss(a, b) + penalty(model.parameters())) as pipe:
        pipe.step(x, target=y)
    for p, q in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_hooks_on_parameters_run():
    model, calls = chain(), []
    weight = model[0].weight
    weight.register_hook(lambda g: g * 2)
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(p is weight))
    plain = twin(model)
    plain[0].weight.register_hook(lambda g: g * 2)
    x, y = torch.randn(8, 12), torch.randn(8, 12)
    reference_step(plain, x, y, 4, F.mse_loss)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
    assert_same_gradients(model, gradients(plain))
    assert calls == [True]


def test_sparse_gradients():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 4, sparse=True)

        def forward(self, ids):
            return self.table(ids)

    model = nn.Sequential(Bag(), nn.Linear(4, 4))
    plain = twin(model)
    x, y = torch.randint(50, (8,)), torch.randn(8, 4)
    reference_step(plain, x, y, 4, F.mse_loss)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
    assert model[0].table.weight.grad.is_sparse
    assert torch.equal(model[0].table.weight.grad.to_dense(), plain[0].table.weight.grad.to_dense())


class Keyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, *, scale, bias=None, name="none"):
        assert name in ("none", "given")
        out = self.linear(x) * scale
        return out if bias is None else out + bias


def test_keyword_inputs_of_the_first_stage():
    stages = [Keyword(), nn.Linear(4, 4)]
    plain = [twin(s) for s in stages]
    x, y, scale = torch.randn(7, 4), torch.randn(7, 4), torch.randn(7, 1)
    bias = torch.tensor(0.5)  # no dimension: goes to every microbatch
    for a, b, s in zip(*(t.tensor_split(3) for t in (x, y, scale))):
        out = plain[1](plain[0](a, scale=s, bias=bias, name="given"))
        (F.mse_loss(out, b) * (len(a) / 7)).backward()
    with pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y, scale=scale, bias=bias, name="given")
        assert pipe.eval(x, scale=scale).shape == (7, 4)
    for stage, other in zip(stages, plain):
        assert_same_gradients(stage, gradients(other))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_very_first_layer_in_place(schedule, needs_grad):
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Linear(6, 6))
    plain, x, y = twin(model), torch.randn(8, 6), torch.randn(8, 6)
    reference_step(plain, x.clone(), y, 4, F.mse_loss)
    with pe.Pipeline(model, 2, 4, schedule, F.mse_loss) as pipe:
        for _ in range(5):
            model.zero_grad()
            pipe.step(x.clone().requires_grad_(needs_grad), target=y)
            assert_same_gradients(model, gradients(plain))


def test_a_first_layer_in_place_after_a_layer_that_saved_its_output_fails_as_unsplit():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.ReLU(inplace=True), nn.Linear(4, 4))
    x = torch.randn(4, 4)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        F.mse_loss(model(x), x).backward()
    with pe.Pipeline(model, microbatches=2, cuts=["2"], loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.StageError, match="modified by an inplace operation"):
            pipe.step(x, target=x)


# The second compiles C++, and is the same to autograd and the pipeline.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.every)])
@pytest.mark.parametrize("overlap", [False, True])
def test_compiled_stages(overlap, backend):
    stages = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(2)]
    plain = nn.Sequential(*(twin(s) for s in stages))
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    reference_step(plain, x, y, 4, F.mse_loss)
    compiled = [torch.compile(s, backend=backend) for s in stages]
    with pe.Pipeline(compiled, microbatches=4, loss_fn=F.mse_loss, overlap=overlap) as pipe:
        for _ in range(3):
            for s in stages:
                s.zero_grad()
            pipe.step(x, target=y)
            for p, q in zip(nn.Sequential(*stages).parameters(), plain.parameters()):
                torch.testing.assert_close(p.grad, q.grad)


def test_a_model_on_the_meta_device_gets_memory_and_values():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        assert pipe.step(x, target=y) > 0
        assert not any(p.is_meta or p.grad is None for p in model.parameters())

    class NoReset(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2, device="meta"))

    with pytest.raises(pe.InvalidArgument, match="NoReset has scale on the meta.*no reset_parameters"):
        pe.Pipeline([nn.Linear(4, 2), NoReset()], microbatches=4, loss_fn=F.mse_loss)
