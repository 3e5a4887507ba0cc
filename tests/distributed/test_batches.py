"""What batches and models two processes can train on: each with the gradients of plain autograd, to the bit."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Images, Residual, chain, tree, tree_batch, tree_loss
from processes import run
from reference import gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe


class Pair:
    """A pipeline over all processes and the plain model that it is held against."""

    def __init__(self, model, microbatches=4, schedule="1f1b", loss_fn=F.mse_loss, stages=2, call=None):
        """``model``: a module, or a list of stages; ``call``: the plain model's, for inputs in a tuple."""
        whole = model if isinstance(model, nn.Module) else nn.Sequential(*model)
        self.plain, self.model = twin(whole), twin(whole)
        self.call = self.plain if call is None else lambda x: call(self.plain, x)
        self.microbatches, self.loss_fn = microbatches, loss_fn
        given = self.model if isinstance(model, nn.Module) else list(self.model)
        self.pipe = pe.Pipeline(
            given, stages, microbatches, schedule, loss_fn, mesh=dist.group.WORLD, timeout=20
        )

    def step(self, x, y, *args, **kwargs):
        """Trains both on a batch; ``args`` and ``kwargs``: how the pipeline is given ``x``, if not as one."""
        loss = self.pipe.step(*(args or (x,)), target=y, **kwargs)
        expected = reference_step(self.call, x, y, self.microbatches, self.loss_fn)
        torch.testing.assert_close(loss, expected)
        self.check()

    def check(self):
        expected = gradients(self.plain)
        local = {p for module in self.pipe.stage_modules for p in module.parameters()}
        assert local
        for name, p in self.model.named_parameters():
            if p in local:
                same = p.grad is expected[name] is None or torch.equal(p.grad, expected[name])
                assert same, f"{name} differs from the reference"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.pipe.close()


def batch(*shape):
    return torch.randn(shape), torch.randn(shape)


# -- how many rows, and of what length


def few_microbatches():
    with Pair(chain(), microbatches=2, stages=4, schedule="interleaved-1f1b") as fewer_than_stages:
        fewer_than_stages.step(*batch(6, 12))
    for schedule in ("gpipe", "1f1b", "zb-h1"):
        with Pair(chain(), microbatches=1, schedule=schedule) as one:
            one.step(*batch(3, 12))
            one.step(*batch(5, 12))


def changing_batches():
    model = nn.Sequential(*(Residual(12) for _ in range(4)))
    for schedule in ("1f1b", "zb-h1"):
        with Pair(model, schedule=schedule) as pair:
            for rows, length in ((8, 5), (8, 9), (7, 2), (11, 9), (4, 1), (8, 5)):
                pair.step(*batch(rows, length, 12))


def evaluation_between_steps():
    with Pair(chain()) as pair:
        for rows in (8, 7, 3, 9):
            x, y = batch(rows, 12)
            found = pair.pipe.eval(x)
            pair.check()  # the gradients that have been added up are left alone
            if dist.get_rank() == 1:
                torch.testing.assert_close(found, pair.plain(x))
            else:
                assert found is None
            if rows >= pair.microbatches:
                pair.step(x, y)


def evaluation_of_many_microbatches():
    model, (x, y) = chain(), batch(70, 12)
    for schedule in ("interleaved-1f1b", "zbv"):
        for reactive in (True, False):
            with pe.Pipeline(
                twin(model), 4, 64, schedule, F.mse_loss, mesh=dist.group.WORLD, reactive=reactive, timeout=20
            ) as pipe:
                pipe.step(x, target=y)
                found = pipe.eval(x)
                assert found is None or torch.allclose(found, model(x), atol=1e-6)


@pytest.mark.parametrize(
    "body",
    [few_microbatches, changing_batches, evaluation_between_steps, evaluation_of_many_microbatches],
)
def test_batches_of_any_size_give_the_reference_gradients(body):
    run(2, body)


# -- what stages take and return


class Weighted(nn.Module):
    """Takes two tensors and a number, and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, a, b, scale=1.0):
        return self.left(a) * scale, self.right(b)


class Joined(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, pair):
        return {"sum": self.layer(pair[0]) + pair[1], "count": pair[0].argmax(1)}


def several_values():
    with Pair(tree(), loss_fn=tree_loss) as pair:
        for rows in (8, 9):
            pair.step(*tree_batch(rows))
            found = pair.pipe.eval(tree_batch(rows)[0])
            assert found is None or set(found) == {"h", "skip", "mask", "ids"}

    def call(model, x):
        return model[1](model[0](*x, scale=0.5))

    def loss_fn(out, target):
        return F.mse_loss(out["sum"], target["y"])

    with Pair([Weighted(), Joined()], loss_fn=loss_fn, stages=None, call=call) as pair:
        a, b = batch(6, 4)
        pair.step((a, b), {"y": torch.randn(6, 4)}, a, b, scale=0.5)


def whole_numbers():
    model = nn.Sequential(nn.Embedding(7, 12), Residual(12), nn.Linear(12, 7))
    with Pair(model, loss_fn=lambda out, ids: F.cross_entropy(out.flatten(0, 1), ids.flatten())) as pair:
        for length in (5, 3):
            ids = torch.randint(7, (6, length))
            pair.step(ids, ids)


def frozen_first_stage():
    for schedule in ("1f1b", "zb-h1"):
        model = chain()
        model[:8].requires_grad_(False)
        with Pair(model, schedule=schedule) as pair:
            pair.step(*batch(8, 12))
            if dist.get_rank() == 1:
                assert all(p.grad is not None for p in pair.pipe.stage_modules[0].parameters())


def batch_norm():
    with Pair(nn.Sequential(Images(), nn.Linear(12, 12), Images(), nn.Linear(12, 12))) as pair:
        for rows in (8, 10):
            pair.step(*batch(rows, 12))
        norm = pair.plain[0 if dist.get_rank() == 0 else 2].inner[1]
        (same,) = [m for s in pair.pipe.stage_modules for m in s.modules() if isinstance(m, nn.BatchNorm1d)]
        for found, expected in zip(same.buffers(), norm.buffers()):
            assert torch.equal(found, expected)
        assert same.num_batches_tracked == 8


class Expert(nn.Module):
    """Returns a loss of its own beside its value."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return pe.WithLoss(y, y.square().mean() * 0.1)


def losses_of_stages():
    stages = [nn.Linear(4, 4), Expert(), Expert(), nn.Linear(4, 4)]
    plain = nn.Sequential(*map(twin, stages))
    x, y = batch(7, 4)
    total = 0
    for a, b in zip(x.tensor_split(3), y.tensor_split(3)):
        h, extra = plain[0](a), []
        for stage in plain[1:3]:
            out = stage(h)
            h = out.value
            extra.append(out.loss)
        loss = (F.mse_loss(plain[3](h), b) + sum(extra)) * (len(a) / 7)
        loss.backward()
        total += loss.detach()
    pipe = pe.Pipeline(stages, None, 3, "interleaved-1f1b", F.mse_loss, mesh=dist.group.WORLD, timeout=20)
    torch.testing.assert_close(pipe.step(x, target=y), total)
    pipe.close()
    local = {p for module in pipe.stage_modules for p in module.parameters()}
    pairs = zip(nn.Sequential(*stages).parameters(), plain.parameters(), strict=True)
    compared = [(p, q) for p, q in pairs if p in local]
    assert len(compared) == 4
    for p, q in compared:
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    "body", [several_values, whole_numbers, frozen_first_stage, batch_norm, losses_of_stages]
)
def test_stages_that_take_and_return_other_than_one_tensor_give_the_reference_gradients(body):
    run(2, body)


# -- where the modules come from


def stages_as_functions():
    rank = dist.get_rank()
    plain = nn.Sequential(*(Residual(12) for _ in range(4)))
    made = []

    def stage(index):
        made.append(index)
        return twin(plain[index])

    stages = [lambda index=index: stage(index) for index in range(4)]
    pipe = pe.Pipeline(stages, None, 4, "interleaved-1f1b", F.mse_loss, mesh=dist.group.WORLD, timeout=20)
    assert made == [rank, rank + 2]
    with contextlib.closing(pipe):
        x, y = batch(8, 12)
        pipe.step(x, target=y)
    reference_step(plain, x, y, 4, F.mse_loss)
    for index, module in zip(made, pipe.stage_modules, strict=True):
        for p, q in zip(module.parameters(), plain[index].parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)


def model_on_meta():
    plain = chain()
    with torch.device("meta"):
        model = chain()
    with contextlib.closing(pe.Pipeline(model, 2, 4, "1f1b", F.mse_loss, mesh=dist.group.WORLD)) as pipe:
        local = [layer for layer in model if not any(p.is_meta for p in layer.parameters())]
        linear = [layer for layer in local if isinstance(layer, nn.Linear)]
        assert linear and all(layer.weight.std() > 0 for layer in linear)
        with torch.no_grad():
            names = [name for name, p in model.named_parameters() if not p.is_meta]
            for name in names:
                model.get_parameter(name).copy_(plain.get_parameter(name))
        assert 0 < len(names) < len(list(model.parameters()))
        x, y = batch(8, 12)
        pipe.step(x, target=y)
    reference_step(plain, x, y, 4, F.mse_loss)
    for name in names:
        assert torch.equal(model.get_parameter(name).grad, plain.get_parameter(name).grad)


@pytest.mark.parametrize("body", [stages_as_functions, model_on_meta])
def test_a_process_makes_only_the_stages_that_it_runs(body):
    run(2, body)


# -- what is refused


def other_rows_in_the_target():
    with Pair(chain()) as pair:
        x, y = batch(8, 12)
        pair.step(x, y)
        with pytest.raises(pe.PipelineError) as failed:
            pair.pipe.step(x, target=y[:6])
        return str(failed.value)


def test_a_target_of_another_batch_is_refused_in_every_process():
    for text in run(2, other_rows_in_the_target):
        assert "target has 6 rows where the batch has 8" in text


def too_few_rows():
    """Process 0 is given a batch that is refused, and then another."""
    with Pair(chain()) as pair:
        x, y = batch(8, 12)
        if dist.get_rank() == 0:
            with pytest.raises(pe.InvalidArgument, match="rows"):
                pair.pipe.step(x[:2], target=y[:2])
        pair.step(x, y)


def test_a_process_whose_batch_was_refused_can_give_another():
    run(2, too_few_rows)
