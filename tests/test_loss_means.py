"""A mean in a loss that is not over rows is found in autograd's graph, and refused with advice that works."""

import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from reference import assert_close_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe

CLASSES, MICROBATCHES = 5, 3


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def whole(plain, x, y, loss_fn):
    """The loss of the whole batch at once, and its gradients."""
    loss = loss_fn(plain(x), y)
    loss.backward()
    return loss.detach(), gradients(plain)


def kinds(chance):
    """Losses by name: the loss, its targets, and the loss_weight with which microbatches give the batch's."""
    left_out = chance.randrange(CLASSES)
    weight = torch.tensor([chance.uniform(0.1, 2.0) for _ in range(CLASSES)])
    factor = chance.uniform(0.5, 2.0)
    counts, weighs = pe.count_not(left_out), lambda labels: weight[labels].sum()

    def labels(rows):
        return torch.randint(CLASSES, (rows,))

    def numbers(rows):
        y = torch.randn(rows, CLASSES)
        y[torch.rand(rows, CLASSES) < 0.4] = float("inf")
        y[:, 0] = 0.5
        return y

    def masked(out, y):
        return F.mse_loss(out[y < 9], y[y < 9])

    def by_hand(out, y):
        kept = y < 9
        return ((out - y.clamp(max=9)).square() * kept).sum() / kept.sum()

    return {
        "a label is left out": (nn.CrossEntropyLoss(ignore_index=left_out), labels, counts),
        "the same, scaled": (
            lambda o, y: factor * F.cross_entropy(o, y, ignore_index=left_out),
            labels,
            counts,
        ),
        "the same, halved": (lambda o, y: -F.nll_loss(-o, y, ignore_index=left_out) / -2, labels, counts),
        "classes weigh": (nn.CrossEntropyLoss(weight=weight), labels, weighs),
        "smoothed": (nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), labels, weighs),
        "masked": (masked, numbers, lambda y: (y < 9).sum()),
        "masked, absolute": (lambda o, y: (o - y)[y < 9].abs().mean(), numbers, lambda y: (y < 9).sum()),
        "counted by hand": (
            lambda o, y: F.cross_entropy(o, y, ignore_index=left_out, reduction="sum") / (y != left_out).sum(),
            labels,
            counts,
        ),
        "masked by hand": (by_hand, numbers, lambda y: (y < 9).sum()),
        "a term is masked": (
            lambda o, y: o.square().mean() * 0 + masked(o, y),
            numbers,
            lambda y: (y < 9).sum(),
        ),
    }


@pytest.mark.parametrize("kind", kinds(random.Random(0)))
def test_a_mean_that_is_not_over_rows_is_refused_and_the_advice_gives_the_batch_s(kind):
    found = set()
    for seed in range(10):
        chance = random.Random(seed)
        torch.manual_seed(seed)
        rows = chance.randint(2 * MICROBATCHES, 12)
        loss_fn, target, weight = kinds(chance)[kind]
        x, y, trained = torch.randn(rows, 4), target(rows), model()
        plain = twin(trained)
        loss, wanted = whole(plain, x, y, loss_fn)
        options = {"microbatches": MICROBATCHES, "loss_fn": loss_fn}
        with pe.Pipeline(trained, 2, **options) as pipe:
            try:
                by_rows = pipe.step(x, target=y)
                torch.testing.assert_close(by_rows, loss)
                assert_close_gradients(trained, wanted)
                found.add("right")
            except pe.InvalidArgument as error:
                assert "would not be the mean over the batch. Give Pipeline loss_weight=" in str(error)
                assert all(p.grad is None for p in trained.parameters())
                found.add("refused")
        trained.zero_grad()
        with pe.Pipeline(trained, 2, loss_weight=weight, **options) as pipe:
            torch.testing.assert_close(pipe.step(x, target=y), loss)
            assert_close_gradients(trained, wanted)
        trained.zero_grad()
        plain.zero_grad()
        with pe.Pipeline(trained, 2, loss_weight="rows", **options) as pipe:
            expected = reference_step(plain, x, y, MICROBATCHES, loss_fn)
            torch.testing.assert_close(pipe.step(x, target=y), expected, equal_nan=True)
    assert "refused" in found


RIGHT = {
    "labels": (nn.CrossEntropyLoss(), lambda rows: torch.randint(CLASSES, (rows,))),
    "a label that no row has": (
        nn.CrossEntropyLoss(ignore_index=9),
        lambda rows: torch.randint(CLASSES, (rows,)),
    ),
    "equal weights": (
        nn.CrossEntropyLoss(weight=torch.full((CLASSES,), 0.3)),
        lambda rows: torch.randint(CLASSES, (rows,)),
    ),
    "probabilities": (nn.CrossEntropyLoss(), lambda rows: torch.rand(rows, CLASSES).softmax(1)),
    "squares": (F.mse_loss, lambda rows: torch.randn(rows, CLASSES)),
    "huber": (lambda o, y: 2 * F.huber_loss(o, y) - F.l1_loss(o, y), lambda rows: torch.randn(rows, CLASSES)),
    "divergence": (nn.KLDivLoss(reduction="batchmean"), lambda rows: torch.rand(rows, CLASSES).softmax(1)),
    "a sum over rows": (
        lambda o, y: F.mse_loss(o, y, reduction="sum") / len(y),
        lambda rows: torch.randn(rows, CLASSES),
    ),
    "a sum over a number": (
        lambda o, y: 0.5 * (o - y).square().sum() / (len(y) * CLASSES),
        lambda rows: torch.randn(rows, CLASSES),
    ),
    "a mean of each row's": (
        lambda o, y: ((o * (y > 0)).sum(1) / (y > 0).sum(1).clamp(min=1)).mean(),
        lambda rows: torch.randn(rows, CLASSES),
    ),
    "a mean of the columns' sums": (
        lambda o, y: (o - y).square().mean(0).sum(),
        lambda rows: torch.randn(rows, CLASSES),
    ),
    "its own weights": (
        lambda o, y: F.cross_entropy(o, y, ignore_index=0) * (y != 0).sum() / len(y),
        lambda rows: torch.randint(CLASSES, (rows,)).index_fill(0, torch.arange(0, rows, 2), 1),
    ),
}


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("rows", [6, 7, 8, 11])
def test_a_mean_over_rows_is_the_whole_batch_s(kind, rows):
    loss_fn, target = RIGHT[kind]
    x, y, trained = torch.randn(rows, 4), target(rows), model()
    loss, wanted = whole(twin(trained), x, y, loss_fn)
    with pe.Pipeline(trained, 2, MICROBATCHES, loss_fn=loss_fn) as pipe:
        torch.testing.assert_close(pipe.step(x, target=y), loss)
        assert_close_gradients(trained, wanted)


@pytest.mark.parametrize("rows", [6, 7])
def test_a_mean_that_is_not_over_rows_at_all_is_left_alone(rows):
    trained, shared = model(), nn.Parameter(torch.randn(9))
    loss_fn = lambda out, y: F.mse_loss(out, y) + 0.1 * shared.square().mean()  # noqa: E731
    x, y = torch.randn(rows, 4), torch.randn(rows, CLASSES)
    loss, wanted = whole(twin(trained), x, y, loss_fn)
    with pe.Pipeline(trained, 2, MICROBATCHES, loss_fn=loss_fn) as pipe:
        torch.testing.assert_close(pipe.step(x, target=y), loss)
        assert_close_gradients(trained, wanted)


@pytest.mark.parametrize("left_out", [-1, -100, 3])
def test_the_advice_names_the_label_that_is_left_out(left_out):
    labels = torch.tensor([0, left_out, 1, 2, 4, 4])
    # As floats: labels of -100 among integers are refused before anything runs.
    loss_fn = lambda out, y: F.cross_entropy(out, y.long(), ignore_index=left_out)  # noqa: E731
    with pe.Pipeline(model(), 2, MICROBATCHES, loss_fn=loss_fn) as pipe:
        with pytest.raises(pe.InvalidArgument, match=rf"count_not\({left_out}\) for labels") as found:
            pipe.step(torch.randn(6, 4), target=labels.float())
    assert "over 1 in microbatch 0 and over 2 in microbatch 1" in str(found.value)


@pytest.mark.parametrize(
    "loss_fn", [nn.MSELoss(reduction="sum"), lambda o, y: F.l1_loss(o, y, reduction="sum")]
)
def test_a_sum_is_refused_and_the_advice_works(loss_fn):
    x, y, trained = torch.randn(7, 4), torch.randn(7, CLASSES), model()
    with pe.Pipeline(trained, 2, MICROBATCHES, loss_fn=loss_fn) as pipe:
        if isinstance(loss_fn, nn.Module):
            with pytest.raises(pe.StageError, match='give Pipeline loss_reduction="sum"'):
                pipe.step(x, target=y)
            assert all(p.grad is None for p in trained.parameters())
    loss, wanted = whole(twin(trained), x, y, loss_fn)
    with pe.Pipeline(trained, 2, MICROBATCHES, loss_fn=loss_fn, loss_reduction="sum") as pipe:
        torch.testing.assert_close(pipe.step(x, target=y), loss)
        assert_close_gradients(trained, wanted)


def of_processes():
    trained, x, y = model(), torch.randn(9, 4), torch.tensor([0, 0, 1, 1, 2, 3, 4, 4, 4])
    loss_fn = nn.CrossEntropyLoss(ignore_index=0)
    with pe.Pipeline(trained, 2, MICROBATCHES, loss_fn=loss_fn, mesh=dist.group.WORLD) as pipe:
        with pytest.raises(pe.PipelineError) as refused:
            pipe.step(x, target=y)
    assert all(p.grad is None for p in trained.parameters())
    plain = model()
    plain.load_state_dict(trained.state_dict())
    loss, wanted = whole(plain, x, y, loss_fn)
    with pe.Pipeline(
        trained, 2, MICROBATCHES, loss_fn=loss_fn, loss_weight=pe.count_not(0), mesh=dist.group.WORLD
    ) as pipe:
        torch.testing.assert_close(pipe.step(x, target=y), loss)
        for name, p in pipe.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name])
    return type(refused.value).__name__, str(refused.value)


def test_all_processes_end_and_are_told():
    first, last = run(2, of_processes)
    assert last[0] == "InvalidArgument" and "over 1 in microbatch 0 and over 3 in microbatch 1" in last[1]
    assert first[0] in ("PeerError", "DeadPipeline") and "process 1 failed: InvalidArgument" in first[1]
