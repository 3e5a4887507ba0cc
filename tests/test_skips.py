"""Skip connections past stages: the gradients of the plain model, messages of their own, and clear refusals."""

import functools
import gc
import itertools
import math
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from models import masked
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

WIDTH = 6
SCHEDULES = [name for name in pe.schedule_names() if name not in ("dualpipe", "zb-auto")]
pytestmark = pytest.mark.usefixtures("short_searches")


@pe.skips(stash=lambda level: level.stashes, pop=lambda level: level.pops)
class Level(nn.Module):
    """A level of a U-Net. ``last`` is called with what it hands on, after it has stashed."""

    def __init__(self, stashes=(), pops=(), last=None):
        super().__init__()
        self.stashes, self.pops, self.last = stashes, pops, last
        self.mix = nn.Linear(WIDTH * (1 + len(pops)), WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = self.norm(self.mix(torch.cat([x, *(pe.pop(name).relu_() for name in self.pops)], 1)).relu_())
        for name in self.stashes:
            pe.stash(name, x)
        return x + x.tanh() if self.last is None else self.last(x)


def unet():
    """Skips from stage 0 to 3 and from 1 to 2; where ranks hold stages in a V, both ends of each on one."""
    return nn.Sequential(Level(["far"]), Level(["near"]), Level([], ["near"]), Level([], ["far"]))


def batch(rows=19):
    return torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)


def assert_trains_as_plain(pipe, model, plain, x, y, loss_fn=F.mse_loss, steps=2):
    for _ in range(steps):
        model.zero_grad()
        plain.zero_grad()
        expected = reference_step(plain, x, y, pipe.microbatches, loss_fn)
        assert torch.equal(pipe.step(x, target=y), expected)
        assert_same_gradients(model, gradients(plain))


# -- the same bits


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_are_those_of_the_plain_model(schedule, overlap):
    model, (x, y) = unet(), batch()
    plain = twin(model)
    for reactive, k in itertools.product((False, True), (1, 3, "all")):
        with pe.Pipeline(
            model, 4, 8, schedule, F.mse_loss,
            overlap=overlap, reactive=reactive, pack_skips={"far": k, "near": 2},
        ) as pipe:  # fmt: skip
            assert_trains_as_plain(pipe, model, plain, x, y)
            expected = torch.cat([plain(part) for part in x.tensor_split(8)])
            assert torch.equal(pipe.eval(x), expected)


def test_each_skip_has_messages_and_a_k_of_its_own():
    model, (x, y) = unet(), batch()
    with pe.Pipeline(model, 4, 8, "1f1b", F.mse_loss, pack=2, pack_skips={"far": 3}) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y)
        assert [(s.source, s.target, s.pack, s.pack_forward) for s in pipe.plan.skips] == [
            (0, 3, 3, 3),
            (1, 2, 1, 1),
        ]
        counted = {(m.skip, m.direction): m.count for m in pipe.trace.messages if m.skip}
        assert counted == {
            ("far", "forward"): math.ceil(8 / 3),
            ("far", "backward"): math.ceil(8 / 3),
            ("near", "forward"): 8,
            ("near", "backward"): 8,
        }
        assert pipe.plan.num_messages == sum(m.count for m in pipe.trace.messages)
        assert pipe.profile().result_bytes == [m.result_nbytes for m in pipe.trace.messages[:3]]


def test_between_stages_of_one_rank_a_skip_is_no_message():
    model, (x, y) = unet(), batch()
    with pe.Pipeline(model, 4, 8, "zbv", F.mse_loss, pack_skips={"far": 4, "near": 4}) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y)
        assert not [m for m in pipe.trace.messages if m.skip]


def test_a_skip_within_a_stage_is_a_plain_function():
    model, (x, y) = unet(), batch()
    plain = twin(model)
    for stages in (1, 2, 3):
        with pe.Pipeline(model, stages, 8, "1f1b", F.mse_loss, cuts=[2, 3][: stages - 1]) as pipe:
            assert_trains_as_plain(pipe, model, plain, x, y)


def test_stages_that_functions_make_may_have_skips():
    model, (x, y) = unet(), batch()
    functions = [functools.partial(model.__getitem__, stage) for stage in range(4)]
    with pe.Pipeline(functions, None, 8, "1f1b", F.mse_loss, pack_skips={"far": 2}) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y)


def test_a_wire_type_holds_for_skips_too():
    model, (x, y) = unet(), batch()
    plain = twin(model)
    expected = reference_step(plain, x, y, 8, F.mse_loss)
    settings = {"wire": torch.bfloat16, "wire_forward": torch.bfloat16, "pack_skips": {"far": 2}}
    with pe.Pipeline(model, 4, 8, "1f1b", F.mse_loss, **settings) as pipe:
        found = pipe.step(x, target=y)
        assert torch.allclose(found, expected, rtol=0.05) and not torch.equal(found, expected)
        far = [m for m in pipe.trace.messages if m.skip == "far"]
        assert [(m.count, m.packed_nbytes > 0) for m in far] == [(4, True), (4, True)]
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=0.05)


def test_what_needs_no_gradient_is_skipped_too():
    model, (x, y) = masked(6, 3), batch()
    for k in (1, 3):
        with pe.Pipeline(model, 3, 8, "zb-h1", F.mse_loss, pack_skips={"mask": k}) as pipe:
            assert_trains_as_plain(pipe, model, twin(model), x, y)


def test_a_checkpointed_part_may_stash():
    @pe.skips(stash=["inner"])
    class First(nn.Linear):
        def forward(self, x):
            pe.stash("inner", super().forward(x).tanh())
            return x * 2

    class Recomputed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = First(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH))

        def forward(self, x):
            return checkpoint(self.first, x, use_reentrant=False) * self.weight

    model, (x, y) = nn.Sequential(Recomputed(), nn.Linear(6, 6), Level([], ["inner"])), batch()
    with pe.Pipeline(model, 3, 8, "1f1b", F.mse_loss) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y)


def test_layers_are_timed_with_their_skips():
    with pe.Pipeline(unet(), 2, 4, loss_fn=F.mse_loss, balance="time", sample=batch(4)[0]) as pipe:
        assert pipe.num_stages == 2


# -- with all else that stages hand over


@pe.skips(stash=["early"])
class TwoOut(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.layer, self.tied = nn.Linear(WIDTH, WIDTH), tied

    def forward(self, x, scale):
        h = self.layer(x * scale)
        pe.stash("early", h)
        return {"h": F.linear(h, self.tied), "scale": scale}


class Auxiliary(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, state):
        h = self.layer(state["h"]).tanh()
        return pe.WithLoss((h, state["scale"]), 0.1 * h.square().mean())


@pe.skips(pop=["early"])
class TwoIn(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.tied = tied

    def forward(self, pair):
        h, scale = pair
        return F.linear(h + pe.pop("early"), self.tied) * scale


def test_with_pytrees_tied_weights_and_losses_of_stages():
    tied = nn.Parameter(torch.randn(WIDTH, WIDTH))
    stages = [TwoOut(tied), Auxiliary(), TwoIn(tied)]
    model = nn.ModuleList(stages)
    (x, y), scale = batch(16), torch.rand(16, 1)
    plain = twin(model)
    for a, b, c in zip(x.split(4), scale.split(4), y.split(4)):
        middle = plain[1](plain[0](a, b))
        ((F.mse_loss(plain[2](middle.value), c) + middle.loss) / 4).backward()
    expected = gradients(plain)
    for schedule, k in itertools.product(("gpipe", "1f1b", "zb-h1"), (1, 2)):
        model.zero_grad()
        with pe.Pipeline(stages, None, 4, schedule, F.mse_loss, pack_skips={"early": k}) as pipe:
            pipe.step(x, scale, target=y)
        for name, p in model.named_parameters():
            # Of several stages, parameters' gradients are added up at the end of the step.
            assert torch.allclose(p.grad, expected[name], atol=1e-6), name


# -- the plain model


def test_in_the_plain_model_threads_do_not_meet():
    model = unet()
    parts = [torch.randn(5, WIDTH) for _ in range(40)]
    expected = [model(part) for part in parts]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(pool.map(model, parts), expected))


def test_a_forward_that_failed_does_not_disturb_the_next():
    model = nn.Sequential(Level(["a"]), nn.Linear(WIDTH, WIDTH), Level([], ["a"]))
    x = torch.randn(4, WIDTH)
    expected = model(x)
    model[1], kept = nn.Linear(1, 1), model[1]
    with pytest.raises(RuntimeError):
        model(x)
    model[1] = kept
    assert torch.equal(model(x), expected)


# -- what is refused


@pytest.mark.parametrize(
    "levels, part",
    [
        ([([], []), ([], ["a"])], "stage 1 pops 'a', which no module stashes"),
        ([(["a"], []), ([], [])], "stage 0 stashes 'a', which no module pops"),
        ([(["a"], []), (["a"], ["a"])], "two modules stash 'a', in stages 0 and 1"),
        ([(["a"], []), ([], ["a"]), ([], ["a"])], "two modules pop 'a', in stages 1 and 2"),
        ([([], ["a"]), (["a"], [])], "stage 0 pops 'a' before stage 1 stashes it"),
    ],
)
def test_ends_that_do_not_match_are_refused(levels, part):
    model = nn.Sequential(*(Level(*ends) for ends in levels))
    with pytest.raises(pe.InvalidArgument, match=part):
        pe.Pipeline(model, len(levels), 4, loss_fn=F.mse_loss)


def test_packs_that_cannot_be_are_refused():
    for given, part in (
        ({"fra": 2}, r"names the skip 'fra'; those between stages are \['far', 'near'\]"),
        ({"far": 0}, "pack_skips of 'far' is 0; give a number from 1 to the 4"),
        (3, "pack_skips is 3; give a dict"),
    ):
        with pytest.raises(pe.InvalidArgument, match=part):
            pe.Pipeline(unet(), 4, 4, loss_fn=F.mse_loss, pack_skips=given)
    with pytest.raises(pe.InvalidSchedule, match="allow 4 in flight"):
        pe.Pipeline(unet(), 4, 4, loss_fn=F.mse_loss, pack_skips={"far": "all"}, in_flight=2)
    with pytest.raises(pe.InvalidSchedule, match="a skip goes from stage 2 to stage 1"):
        pe.build_plan("1f1b", num_stages=4, microbatches=4, skips=[pe.Skip(2, 1)])


def test_what_is_no_declaration_is_refused():
    with pytest.raises(pe.InvalidArgument, match="give a list of names"):
        pe.skips(stash="a")
    with pytest.raises(pe.InvalidArgument, match=r"decorates a class of nn.Module"):
        pe.skips(stash=["a"])(len)
    with pytest.raises(pe.PipelineError, match="outside the forward of a module that declares it"):
        pe.stash("a", torch.zeros(1))
    with pytest.raises(pe.InvalidArgument, match="was given a tuple"):
        pe.stash("a", (torch.zeros(1),))


def declared(run, **ends):
    """A module with these declarations, whose forward is ``run``."""

    @pe.skips(**ends)
    class Given(nn.Module):
        def forward(self, x):
            return run(x)

    return Given()


@pytest.mark.parametrize(
    "run, part",
    [
        (lambda x: x, r"declares stash=\['a'\], but its forward has not done so"),
        (lambda x: (pe.stash("a", x), pe.stash("a", x)), r"called stash\('a'\) twice"),
        (lambda x: pe.stash("b", x), r"stash\('b'\) was called outside"),
    ],
)
def test_a_forward_that_does_not_do_what_is_declared_is_refused(run, part):
    model = nn.Sequential(declared(run, stash=["a"]), declared(lambda x: x + pe.pop("a"), pop=["a"]))
    with pytest.raises(pe.PipelineError, match=part):
        model[0](torch.zeros(2, 2))
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.StageError) as raised:
            pipe.step(torch.zeros(2, 2), target=torch.zeros(2, 2))
        assert raised.value.stage == 0


def test_what_nothing_has_stashed_cannot_be_popped():
    with pytest.raises(pe.PipelineError, match="nothing has stashed it before"):
        declared(lambda x: x + pe.pop("never"), pop=["never"])(torch.zeros(2))


def test_a_recomputed_part_may_not_pop():
    class Recomputed(Level):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    model, (x, y) = nn.Sequential(Level(["a"]), Recomputed([], ["a"])), batch(4)
    with pytest.raises(pe.PipelineError, match="pop it before that part"):
        F.mse_loss(model(x), y).backward()


@pytest.mark.parametrize("k", [1, 2])
def test_memory_that_a_stage_between_changes_in_place_is_refused(k):
    def same(x):
        return x

    model = nn.Sequential(Level(["a"], last=same), nn.ReLU(inplace=True), Level([], ["a"]))
    x, y = batch(4)
    with pe.Pipeline(model, 3, 4, "gpipe", F.mse_loss, pack_skips={"a": k}) as pipe:
        with pytest.raises(pe.StageError) as raised:
            pipe.step(x, target=y)
        assert "changed in place" in str(raised.value.__cause__)
        assert raised.value.stage == 2


# -- nothing stays alive


@pytest.mark.parametrize("k", [1, 3])
def test_after_a_step_nothing_is_left_alive(k):
    alive = []

    def watch(x):
        alive.append(weakref.ref(x))
        if fails:
            raise ValueError("so it is")
        return x + 1

    model = nn.Sequential(Level(["a"]), nn.Linear(WIDTH, WIDTH), Level([], ["a"], last=watch))
    model[0].last = lambda x: (alive.append(weakref.ref(x)), x * 1)[1]
    x, y = batch(8)
    with pe.Pipeline(model, 3, 8, "1f1b", F.mse_loss, pack_skips={"a": k}, trace=False) as pipe:
        for fails in (False, True, False):
            try:
                pipe.step(x, target=y)
                assert not fails
            except pe.StageError:
                assert fails
            gc.collect()
            assert alive and not [ref for ref in alive if ref() is not None]
            alive.clear()
