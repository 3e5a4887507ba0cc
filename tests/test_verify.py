"""``verify`` says what is equal, finds what is not, and leaves everything as it was."""

import pytest
import torch
import torch.nn.functional as F
from models import Constant, chain, tree, tree_batch, tree_loss
from reference import gradients
from test_loss_terms import Block, Head, penalty
from test_random_streams import Noisy, Recomputed
from test_rows import D, S
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

SCHEDULES = ("gpipe", "1f1b", "zb-h1")


def tied():
    table = nn.Embedding(11, 8)
    return nn.Sequential(table, Block(), Block(), Head(table))


HONEST = {
    "chain": (chain, lambda: (torch.randn(9, 12), torch.randn(9, 12)), F.mse_loss),
    "tree": (tree, lambda: tree_batch(8), tree_loss),
    "recomputed": (
        lambda: nn.Sequential(*(Block(recomputed=True) for _ in range(4))),
        lambda: (torch.randn(8, 8), torch.randn(8, 8)),
        F.mse_loss,
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3)
        ),
        lambda: (torch.randn(8, 1, 6, 6), torch.randint(3, (8,))),
        F.cross_entropy,
    ),
}
DRAWING = {
    "dropout": lambda: nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(8, 8), nn.Dropout(0.3)))),
    "all kinds": lambda: nn.Sequential(Noisy(), Noisy(), Noisy()),
    "recomputed": lambda: nn.Sequential(Recomputed(False), Recomputed(True), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", HONEST)
def test_honest_models_pass_bit_for_bit(name, schedule):
    make, batch, loss_fn = HONEST[name]
    x, y = batch()
    with pe.Pipeline(make(), 2, 4, schedule, loss_fn) as pipe:
        for _ in range(2):  # also after steps
            report = pipe.verify(x, target=y)
            assert report.ok and report.bit_for_bit and not report.reasons, str(report)
            assert "bit for bit; from the whole batch at once they are" in report.summary()
            pipe.step(x, target=y)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", DRAWING)
def test_models_that_draw_pass_bit_for_bit_with_the_same_numbers(name, schedule):
    x, y = torch.randn(8, 8).requires_grad_(), torch.randn(8, 8)
    with pe.Pipeline(DRAWING[name](), 3, 4, schedule, F.mse_loss) as pipe:
        for _ in range(2):
            report = pipe.verify(x, target=y)
            assert report.ok and report.bit_for_bit and report.loss_whole is None, str(report)
            assert "draws random numbers" in str(report)
            pipe.step(x, target=y)


def test_tied_weights_and_stages_given_as_a_list_pass_within_rounding():
    ids, y = torch.randint(11, (8, 3)), torch.randint(11, (8, 3))
    model = tied()
    for given, options in ((model, {"num_stages": 2}), (list(model), {})):
        with pe.Pipeline(
            given, microbatches=4, loss_fn=lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()), **options
        ) as pipe:
            report = pipe.verify(ids, target=y)
            assert report.ok and "within rounding" in report.summary()


class Scaled(nn.Linear):
    """Takes a table whole as well as in parts."""

    def forward(self, x, table):
        return super().forward(x * table.mean())


@pytest.mark.parametrize("how", ["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_roundings_of_a_coarser_type_are_no_difference_and_masked_labels_are(how, dtype):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(4)))
    x = torch.randn(16, 8)
    within = torch.autocast("cpu", dtype=dtype, enabled=how == "autocast")
    if how == "cast":
        model, x = model.to(dtype), x.to(dtype)
    target = torch.randint(8, (16,))
    with pe.Pipeline(model, 2, 4, loss_fn=F.cross_entropy, loss_weight="rows") as pipe, within:
        report = pipe.verify(x, target=target)
        assert report.ok and report.bit_for_bit and not report.reasons, str(report)
        target[:3] = -100
        report = pipe.verify(x, target=target)
        assert not report.ok and any("it is no mean over rows" in reason for reason in report.reasons)


class LosesRows(nn.Module):
    """Of a microbatch every row but the first counts 0."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) * (torch.arange(len(x)) == 0)[:, None]


def masked(out, target):
    return F.cross_entropy(out.flatten(0, 1), target.flatten(), ignore_index=0)


def padded():
    ids = torch.randint(1, 9, (8, 5))
    target = ids.clone()
    target[:3, 2:] = 0
    return ids, target


def plant(name):
    """A pipeline that trains something else without an error, with its batch."""
    words = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
    if name == "table":
        return (
            [Scaled(8, 8), nn.Linear(8, 8)],
            F.mse_loss,
            {},
            (torch.randn(S, S, D),),
            {"table": torch.rand(S, 3)},
            torch.randn(S, S, D),
        )
    if name == "sequence first":
        model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0) for _ in range(2)))
        return (model, F.mse_loss, {"num_stages": 2}, (torch.randn(8, 4, 8),), {}, torch.randn(8, 4, 8))
    if name == "ignored labels":
        ids, target = padded()
        return (words, masked, {"num_stages": 2}, (ids,), {}, target)
    if name == "a sum":
        ids, target = padded()
        return (words, lambda o, t: masked(o, t) * 0 + o.sum(), {"num_stages": 2}, (ids,), {}, target)
    if name == "batch norm":
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        return (model, F.mse_loss, {"num_stages": 2}, (torch.randn(8, 4),), {}, torch.randn(8, 2))
    model = nn.Sequential(LosesRows(), nn.Linear(4, 2))
    return (model, F.mse_loss, {"num_stages": 2}, (torch.randn(8, 4),), {}, torch.randn(8, 2))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("table", r"input keyword ['table'], of shape [4, 3], was cut into microbatches"),
        ("sequence first", "lies in dimension 1 of the inputs: give batch_dim=1"),
        ("ignored labels", "it is no mean over rows. If it leaves labels out, give loss_weight="),
        ("a sum", 'if it sums, give loss_reduction="sum"'),
        ("batch norm", "batch norm in training mode"),
        ("rows that mix", "the outputs of a sample depend on the other samples"),
    ],
)
def test_what_trains_something_else_is_found_and_named(name, reason):
    model, loss_fn, options, args, kwargs, target = plant(name)
    with pe.Pipeline(model, microbatches=4, loss_fn=loss_fn, **options) as pipe:
        report = pipe.verify(*args, target=target, **kwargs)
    assert not report.ok and report.worst_whole > 1e-3
    assert reason in str(report), str(report)


def test_a_gradient_that_the_pipeline_loses_is_found(monkeypatch):
    """A fault planted in the engine: one microbatch's weight gradients of one stage are lost."""
    from pipeline_ext.stages import stage

    found = stage.Stage._begin_backward

    def loses(self, step, m):
        outputs, grads, in_flight = found(self, step, m)
        return (
            (outputs, [grad * 0 for grad in grads], in_flight)
            if (self.index, m) == (0, 2)
            else (outputs, grads, in_flight)
        )

    monkeypatch.setattr(stage.Stage, "_begin_backward", loses)
    with pe.Pipeline(chain(), 2, 4, loss_fn=F.mse_loss) as pipe:
        report = pipe.verify(torch.randn(8, 12), target=torch.randn(8, 12))
    assert not report.ok and not report.bit_for_bit and report.worst_microbatched > 1e-2
    assert "the losses are equal and the gradients are not" in str(report) and "DIFFER" in report.summary()
    assert all(p.microbatched == 0 for p in report.parameters if int(p.name.split(".")[0]) >= 12)


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return checkpoint(self.norm, F.dropout(x, 0.1), use_reentrant=False)


def test_nothing_is_touched():
    model = nn.Sequential(nn.Linear(8, 8), Norm(), nn.Linear(8, 8))
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    calls = []
    optimizer = torch.optim.Adam(model.parameters())
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, optimizer=optimizer) as pipe:
        pipe.step(x, target=y)
        model[0].weight.register_post_accumulate_grad_hook(lambda p: calls.append(p))
        before, grads, state = (
            {k: v.clone() for k, v in model.state_dict().items()},
            gradients(model),
            torch.get_rng_state(),
        )
        trace = pipe.trace
        pipe.verify(x, target=y)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(v, grads[k]) for k, v in gradients(model).items())
        assert torch.equal(torch.get_rng_state(), state) and not calls and pipe.trace is trace
        assert [int(s["step"]) for s in optimizer.state.values()] == [1] * len(list(model.parameters()))


def test_what_is_refused_in_a_step_is_refused_here():
    model = nn.Sequential(*(Block() for _ in range(4)))
    listed = list(model.parameters())
    x = torch.randn(8, 8)
    with pe.Pipeline(model, 2, 4, loss_fn=lambda o, t: F.mse_loss(o, t) + penalty(listed)) as pipe:
        with pytest.raises(pe.StageError, match="stage_loss="):
            pipe.verify(x, target=x)
        assert all(p.grad is None for p in model.parameters())
        with pytest.raises(pe.InvalidArgument, match="the batch has 2 rows, too few"):
            pipe.verify(x[:2], target=x[:2])
    with pe.Pipeline(model, 2, 4) as pipe:
        with pytest.raises(pe.InvalidArgument, match="step needs a loss"):
            pipe.verify(x)


def test_a_constant_stage_and_given_microbatches():
    stages = [nn.Linear(4, 12), Constant(), Constant()]
    with pe.Pipeline(stages, microbatches=2, loss_fn=lambda out, t: out[0].sum() * t.mean()) as pipe:
        parts = [torch.randn(n, 4) for n in (1, 3)]
        report = pipe.verify(arg_mbs=parts, target_mbs=parts)
        assert report.bit_for_bit and "given one by one" in str(report)
