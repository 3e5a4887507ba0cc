"""The same seed and number of microbatches give the same losses and gradients, whatever else is chosen."""

import copy
import functools
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import gradients
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe
from pipeline_ext.stages import drawing

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


@pytest.mark.filterwarnings("error")
def test_stages_may_begin_to_draw_and_end():
    model, x = dropouts(), torch.randn(8, 8)
    found = []
    for schedule in ("1f1b", "gpipe", "zb-h1"):
        torch.manual_seed(1)
        with pe.Pipeline(model, STAGES, 4, schedule, F.mse_loss) as pipe:
            results = []
            for trains in (False, True, True, False, True):
                model.train(trains)
                results += [pipe.step(x, target=x), pipe.eval(x, keep_mode=True).sum()]
            found.append(torch.stack([*results, torch.rand(())]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert len(set(found[0].tolist())) > 6  # those that draw differ


@pytest.mark.parametrize("seeds", [True, False])
def test_what_a_stage_draws_past_its_stream_is_warned_of_once(seeds):
    class Past(nn.Linear):
        def forward(self, x):
            # An extension in C++ draws so.
            torch.manual_seed(5) if seeds else torch.default_generator.seed()
            return super().forward(x)

    model, x = nn.Sequential(nn.Linear(8, 8), Past(8, 8)), torch.randn(8, 8)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        with pytest.warns(
            UserWarning, match="during a step torch's generator for the CPU was seeded, or drawn"
        ):
            pipe.step(x, target=x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.step(x, target=x)


@pytest.mark.filterwarnings("error:Dynamo")
def test_compiled_stages_draw_from_their_streams():
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    torch.manual_seed(0)
    plain = dropouts()
    found = []
    for ranks, schedule in ((1, "interleaved-1f1b"), (4, "1f1b")):
        model = copy.deepcopy(plain)
        for layer in model:
            layer.compile(backend="aot_eager")
        found.append(train(model, x, y, schedule=schedule, devices=["cpu"] * ranks))
    assert same(*found)
    assert len({float(loss) for loss, _ in found[0][0]}) == 3


@pytest.mark.filterwarnings("ignore:during a step torch's generator")  # each thread moves it on
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


X = torch.linspace(0.1, 0.9, 40).reshape(8, 5)
LSTM, ATTENTION = nn.LSTM(5, 5, 2, dropout=0.5), nn.MultiheadAttention(5, 1, dropout=0.5)
LAYER = nn.TransformerEncoderLayer(5, 1, 10, dropout=0.5)
traced = torch.jit.trace(lambda x: F.dropout(x, 0.5), X, check_trace=False)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand_like(grad)


def gradient_of(function):
    x = X.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


class Wrapper(torch.Tensor):
    """Its operators run on what it holds."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        found = operator(*(a.held if isinstance(a, Wrapper) else a for a in args), **(kwargs or {}))
        return Wrapper(found) if isinstance(found, torch.Tensor) else found


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return operator(*args, **(kwargs or {}))


def in_a_mode():
    with Mode():
        return F.dropout(X, 0.5)


DRAWING = {
    "dropout": lambda: F.dropout(X, 0.5),
    "dropout in place": lambda: F.dropout(X.clone(), 0.5, inplace=True),
    "torch.dropout": lambda: torch.dropout(X, 0.5, True),
    "native_dropout": lambda: torch.native_dropout(X, 0.5, True)[0],
    "alpha_dropout": lambda: F.alpha_dropout(X, 0.5, True),
    "dropout1d": lambda: F.dropout1d(X, 0.5),
    "rrelu": lambda: F.rrelu(-X, training=True),
    "gumbel_softmax": lambda: F.gumbel_softmax(X),
    "fractional_max_pool2d": lambda: F.fractional_max_pool2d(torch.randn(1, 1, 8, 8), 2, output_size=(3, 3)),
    "attention": lambda: F.scaled_dot_product_attention(X[None], X[None], X[None], dropout_p=0.5),
    "LSTM": lambda: LSTM(X[None].expand(3, 8, 5))[0],
    "MultiheadAttention": lambda: ATTENTION(X, X, X)[0],
    "TransformerEncoderLayer": lambda: LAYER(X),
    "rand": lambda: torch.rand(9),
    "rand of the default generator": lambda: torch.rand(9, generator=torch.default_generator),
    "rand out": lambda: torch.rand(9, out=torch.empty(9)),
    "rand_like": lambda: torch.rand_like(X),
    "randn": lambda: torch.randn(9),
    "randn complex": lambda: torch.view_as_real(torch.randn(9, dtype=torch.complex64)),
    "randn_like": lambda: torch.randn_like(X),
    "randint": lambda: torch.randint(99, (9,)),
    "randint_like": lambda: torch.randint_like(X, 99),
    "randperm": lambda: torch.randperm(50),
    "normal of tensors": lambda: torch.normal(X, X),
    "normal of a mean": lambda: torch.normal(X),
    "normal of a deviation": lambda: torch.normal(0.0, X),
    "normal of numbers": lambda: torch.normal(0.0, 1.0, (9,)),
    "bernoulli": lambda: torch.bernoulli(X),
    "bernoulli_ of a tensor": lambda: torch.empty_like(X).bernoulli_(X),
    "multinomial": lambda: X.multinomial(3),
    "poisson": lambda: torch.poisson(X * 9),
    "binomial": lambda: torch.binomial(torch.full_like(X, 9.0), X),
    "gamma": lambda: torch.distributions.Gamma(X, X).sample(),
    "dirichlet": lambda: torch.distributions.Dirichlet(X).sample(),
    "uniform_": lambda: torch.empty(9).uniform_(),
    "random_": lambda: torch.empty(9).random_(),
    "random_ to": lambda: torch.empty(9).random_(2, 99),
    "exponential_": lambda: torch.empty(9).exponential_(),
    "cauchy_": lambda: torch.empty(9).cauchy_(),
    "geometric_": lambda: torch.empty(9).geometric_(0.5),
    "log_normal_": lambda: torch.empty(9).log_normal_(),
    "trunc_normal_": lambda: nn.init.trunc_normal_(torch.empty(9)),
    "svd_lowrank": lambda: torch.svd_lowrank(X, 2)[0],
    "torch.jit": lambda: traced(X),
    "vmap": lambda: torch.vmap(lambda x: F.dropout(x, 0.5), randomness="different")(X),
    "func.grad": lambda: torch.func.grad(lambda x: F.dropout(x, 0.5).square().sum())(X),
    "a tensor's class": lambda: F.dropout(Wrapper(X), 0.5).held,
    "a mode": in_a_mode,
    "nested": lambda: F.dropout(torch.nested.nested_tensor([X, X]), 0.5).to_padded_tensor(0.0),
    "jagged": lambda: F.dropout(torch.nested.nested_tensor([X, X], layout=torch.jagged), 0.5).values(),
    "a backward": lambda: gradient_of(Backward.apply),
}


class Numbers:
    """The streams of a step, all with one seed."""

    def __init__(self):
        self.drew = set()

    def seed(self, stage, part):
        return 5


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("kind", DRAWING)
def test_every_function_draws_from_the_task_s_stream(kind):
    drawing.install()
    draw = DRAWING[kind]
    torch.manual_seed(5)
    expected, after = draw(), torch.rand(1)
    torch.manual_seed(6)
    state, numbers = torch.default_generator.get_state(), Numbers()
    drawing.enter((numbers, 3, 0))
    try:
        found, then = draw(), torch.rand(1)
    finally:
        drawing.enter(None)
    assert torch.equal(found, expected) and torch.equal(then, after)
    assert torch.equal(torch.default_generator.get_state(), state)
    assert numbers.drew == {3}


def test_no_other_operator_of_torch_draws_on_the_cpu():
    """What this names draws through operators that take a generator, or does not draw on the CPU."""
    drawing.install()
    found = set()
    for name in torch._C._dispatch_get_all_op_names():
        has_kernel = functools.partial(torch._C._dispatch_has_kernel_for_dispatch_key, name)
        if name.startswith("aten::") and has_kernel("CPU") and not has_kernel("BackendSelect"):
            packet, _, overload = name.removeprefix("aten::").partition(".")
            operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
            if torch.Tag.nondeterministic_seeded in operator.tags:
                found.add(packet)
    assert found <= {"native_dropout", "_scaled_dot_product_flash_attention_for_cpu", "_fused_sdp_choice"}


def test_other_threads_draw_torch_s_own_numbers():
    drawing.install()
    torch.manual_seed(5)
    expected = torch.rand(4)
    found = []
    drawing.enter((Numbers(), 0, 0))
    try:
        torch.default_generator.manual_seed(5)
        thread = threading.Thread(target=lambda: found.append(torch.rand(4)))
        thread.start()
        thread.join()
    finally:
        drawing.enter(None)
    assert torch.equal(found[0], expected)
