"""The same seed and number of microbatches give the same losses and gradients, whatever else is chosen."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

SCHEDULES = [name for name in pe.schedule_names() if name not in ("dualpipe", "auto", "zb-auto")]
STAGES = 4


class Noisy(nn.Module):
    """Draws through operators and functions of many kinds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.3, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)

    def forward(self, x):
        x = x + F.dropout(self.linear(x), 0.2) * torch.rand(8) + torch.rand_like(x) * 0.1
        x = x + self.lstm(x[None])[0][0] * torch.bernoulli(torch.full_like(x, 0.9))
        x = x + self.attention(x[None], x[None], x[None])[0][0]
        x = x + torch.normal(0.0, torch.ones(8)) + torch.randn(8).exponential_()
        x = x + F.gumbel_softmax(x) + F.rrelu(x, training=True) + torch.empty(8).uniform_()
        return x + x.detach().softmax(-1).multinomial(2).sum(1, keepdim=True) * 0.1 + torch.randperm(8) * 0.01


class Recomputed(nn.Module):
    """Draws in a part that is recomputed, before it and after it."""

    def __init__(self, reentrant):
        super().__init__()
        self.linear, self.reentrant = nn.Linear(8, 8), reentrant
        self.masks = {}

    def forward(self, x):
        x = F.dropout(x, 0.3, self.training)
        key = torch.randint(2**40, ()).item() if self.training else 0
        x = checkpoint(self._run, x, key, use_reentrant=self.reentrant)
        return F.dropout(x, 0.3, self.training)

    def _run(self, x, key):
        mask = F.dropout(torch.ones_like(x), 0.5, self.training)
        self.masks.setdefault(key, []).append(mask)
        return x + self.linear(x * mask).tanh()


def dropouts(recomputed=None):
    layers = [
        nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4), nn.Tanh())
        if recomputed is None
        else Recomputed(recomputed)
        for _ in range(STAGES)
    ]
    return nn.Sequential(*layers)


def train(model, x, y, steps=3, **options):
    """Losses, gradients, and what the caller's generator gives afterwards."""
    torch.manual_seed(7)
    found = []
    with pe.Pipeline(model, STAGES, 4, loss_fn=F.mse_loss, **options) as pipe:
        for _ in range(steps):
            model.zero_grad()
            found.append((pipe.step(x, target=y), gradients(model)))
    return found, torch.rand(1)


def same(a, b):
    (a, after_a), (b, after_b) = a, b
    return torch.equal(after_a, after_b) and all(
        torch.equal(la, lb) and all(torch.equal(ga[name], gb[name]) for name in ga)
        for (la, ga), (lb, gb) in zip(a, b)
    )


def ways(every):
    """Schedules on all numbers of ranks that they take, with all ways to run them."""
    for schedule in SCHEDULES:
        linear = pe._C.layout_of(schedule) == "linear"
        for ranks in (STAGES,) if linear else (1, 2):
            if schedule in ("zbv", "dualpipev") and ranks == 1:
                continue
            for overlap in (False, True):
                for pack in (1, 2):
                    if every or not (overlap and pack == 2):
                        yield {
                            "schedule": schedule,
                            "devices": ["cpu"] * ranks,
                            "overlap": overlap,
                            "pack": pack,
                        }


@pytest.mark.parametrize("repetitions", [1, pytest.param(3, marks=pytest.mark.every)])
@pytest.mark.parametrize(
    "make", [dropouts, lambda: nn.Sequential(*(Noisy() for _ in range(STAGES)))], ids=["dropout", "all kinds"]
)
def test_one_loss_and_one_set_of_gradients(make, repetitions):
    model, x, y = make(), torch.randn(8, 8), torch.randn(8, 8)
    first = None
    for options in ways(every=repetitions > 1):
        for _ in range(repetitions):
            try:
                found = train(model, x, y, **options)
            except (pe.InvalidSchedule, pe.InvalidArgument):
                continue  # a schedule that does not take so many ranks, or packs
            first = first or found
            assert same(found, first), options
    assert len({float(loss) for loss, _ in first[0]}) == 3  # each step draws others
    with_other_seed = train(model, x + 0, y)
    assert same(with_other_seed, first)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_what_is_recomputed_draws_the_same_again(schedule, reentrant):
    model, x, y = dropouts(reentrant), torch.randn(64, 8), torch.randn(64, 8)
    with pe.Pipeline(model, STAGES, 8, schedule, F.mse_loss) as pipe:
        torch.manual_seed(3)
        for _ in range(5):
            pipe.step(x.requires_grad_(), target=y)
        drawn = [masks for layer in model for masks in layer.masks.values()]
        assert len(drawn) == 5 * 8 * STAGES  # no two microbatches, stages or steps draw the same
        assert all(len(masks) == 2 and torch.equal(*masks) for masks in drawn)
        masks = torch.stack([masks[0].flatten() for masks in drawn])
        assert len(masks.unique(dim=0)) == len(masks)


def test_what_torch_means_by_a_state_is_as_before_outside_of_steps():
    model, x = dropouts(), torch.randn(8, 8)
    with pe.Pipeline(model, STAGES, 4, loss_fn=F.mse_loss) as pipe:
        state = torch.get_rng_state()
        losses = [pipe.step(x, target=x)]
        assert not torch.equal(torch.get_rng_state(), state)  # so that the next step draws others
        torch.set_rng_state(state)
        losses.append(pipe.step(x, target=x))
        assert torch.equal(*losses)


def test_a_model_that_draws_nothing_leaves_the_generator_alone():
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(STAGES))), torch.randn(8, 8)
    with pe.Pipeline(model, STAGES, 4, loss_fn=F.mse_loss) as pipe:
        state = torch.get_rng_state()
        for _ in range(3):
            pipe.step(x, target=x)
            pipe.eval(x)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_of_the_model_s_own_is_used():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.generator = torch.Generator().manual_seed(5)
            self.linear, self.drawn = nn.Linear(8, 8), []

        def forward(self, x):
            self.drawn.append(torch.rand(1, generator=self.generator))
            return self.linear(x)

    model, x = nn.Sequential(Own(), nn.Linear(8, 8)), torch.randn(8, 8)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=x)
    expected = torch.Generator().manual_seed(5)
    assert torch.equal(
        torch.cat(model[0].drawn), torch.cat([torch.rand(1, generator=expected) for _ in range(4)])
    )


def test_a_stage_that_begins_to_draw_is_warned_of_once_and_reproducible_from_then_on():
    model, x = dropouts(), torch.randn(8, 8)
    model.eval()
    with pe.Pipeline(model, STAGES, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=x)
        model.train()
        with pytest.warns(UserWarning, match="by a stage that had drawn none in the first step"):
            pipe.step(x, target=x)
        losses = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                torch.manual_seed(1)
                losses.append(pipe.step(x, target=x))
        assert torch.equal(*losses)


def test_replicas_draw_other_numbers():
    from replicas import Replicas

    model, x, y = dropouts(), torch.randn(8, 8), torch.randn(8, 8)
    with Replicas(model, 2, 4, loss_fn=F.mse_loss) as replicas:
        torch.manual_seed(0)
        losses = replicas.step([(x, y), (x, y)])
    assert not torch.equal(*losses)


def test_ranks_that_keep_the_generator_s_state_do_not_wait_for_one_another_for_good():
    """torch holds the generator's lock while it makes a Python object, which may let another thread run."""
    import gc

    model, x = nn.Sequential(*(Recomputed(False) for _ in range(STAGES))), torch.randn(8, 8)
    model.eval()
    with pe.Pipeline(model, STAGES, 8, loss_fn=F.mse_loss, timeout=20) as pipe:
        threshold = gc.get_threshold()
        gc.set_threshold(1)
        try:
            for _ in range(30):
                pipe.step(x, target=x)
        finally:
            gc.set_threshold(*threshold)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_in_a_stream_is_torch_s_with_the_stream_s_generator(p, inplace):
    from pipeline_ext.stages.drawing import Stream

    x = torch.randn(64, 8, requires_grad=True)
    with Stream(5, lambda: None):
        found = F.dropout(x * 1, p, inplace=inplace)
    torch.default_generator.manual_seed(5)
    expected = F.dropout(x * 1, p, inplace=inplace)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (found, expected)))
