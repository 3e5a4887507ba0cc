"""A model is cut by its own forward: every stage runs it, and computes only its share of the calls."""

import copy
import pickle
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from reference import twin
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe
from pipeline_ext.calls import stage as call_stage

ROUNDING = 1e-6
SCHEDULES = ["gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zbv"]


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x, scale=1.0):
        return x + torch.tanh(self.linear(self.norm(x))) * scale


class Net(nn.Module):
    """What nanoGPT and others do: layers in a list, code between them."""

    def __init__(self, blocks=4):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def around(self, number, x, begin):
        return x

    def forward(self, x):
        x = begin = self.first(x).relu()
        for number, block in enumerate(self.blocks):
            x = self.around(number, block(x), begin)
        return self.last(x)


class Returned(Net):
    """Computes its loss itself."""

    def forward(self, x, y=None):
        x = super().forward(x)
        return {"out": x, "loss": None if y is None else F.mse_loss(x, y)}


def batch():
    return torch.randn(8, 4), torch.randn(8, 2)


def verified(model, stages=2, schedule="1f1b", **options):
    x, y = batch()
    with pe.Pipeline(model, stages, 4, schedule, F.mse_loss, sample=x, **options) as pipe:
        return pipe.verify(x, target=y)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages", [2, 4])
def test_a_net_with_code_between_its_layers_trains_like_plain_autograd(stages, schedule):
    assert verified(Net(), stages, schedule).bit_for_bit


# -- values on other ways than by results and gradients


class Detached(Net):
    def around(self, number, x, begin):
        return x + begin.detach() if number == 3 else x


class Looked(Net):
    def around(self, number, x, begin):
        return x * float(begin.detach().abs().max()) if number == 3 else x


class Chosen(Net):
    def around(self, number, x, begin):
        return x * (1 + begin.argmax(-1, keepdim=True)) * (begin > 0) if number == 3 else x


class Converted(Net):
    def around(self, number, x, begin):
        return x + torch.from_numpy(begin.detach().numpy()) if number == 3 else x


class ChangedInPlace(Net):
    def around(self, number, x, begin):
        return (x * 1).mul_(2.0) if number == 1 else x.add_(1.0)


class WithParameter(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def around(self, number, x, begin):
        return x * self.scale


class OfAnother(Net):
    def around(self, number, x, begin):
        return x + self.first.bias


class Drawing(Net):
    def around(self, number, x, begin):
        return F.dropout(x, 0.3) + torch.rand_like(x)


class Shared(Net):
    """One block is called four times."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x):
        x = self.first(x)
        for _ in range(4):
            x = self.blocks[0](x)
        return self.last(x)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.blocks[3].linear.weight = self.blocks[0].linear.weight


class Normed(Net):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            parametrizations.weight_norm(block.linear)


class Batched(Net):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True)) for _ in range(4)
        )


KINDS = [Detached, Looked, Chosen, Converted, ChangedInPlace, Drawing, Normed, Batched]
SUMMED = [WithParameter, OfAnother, Shared, Tied]  # parameters of several stages


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stages", [2, 3])
def test_every_value_reaches_the_stage_that_needs_it(kind, stages):
    report = verified(kind(), stages, "zb-h1")
    assert report.loss == report.loss_microbatched and report.worst_microbatched <= 1e-5


@pytest.mark.parametrize("kind", SUMMED)
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_parameter_that_several_stages_use_gets_the_sum(kind, schedule):
    report = verified(kind(), 3, schedule)
    assert report.loss == report.loss_microbatched and report.worst_microbatched <= ROUNDING


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)

    def forward(self, x):
        return self.linear(x)


class Expert(Block):
    """Its router's result is collected by a hook, or kept in an attribute, or written to a dict."""

    def __init__(self):
        super().__init__()
        self.router = Router()

    def forward(self, x, store=None):
        scores = self.router(x)
        self.kept = scores.square().mean()
        if store is not None:
            store.setdefault("scores", []).append(scores)
            store["last"] = scores * 2
        return super().forward(x, scores.softmax(-1)[:, :1])


class Experts(Net):
    def __init__(self, way):
        super().__init__()
        self.blocks = nn.ModuleList(Expert() for _ in range(4))
        self.way, self.collected = way, []
        if way == "hooks":
            for block in self.blocks:
                block.router.register_forward_hook(
                    lambda module, args, out: self.collected.append(out.square())
                )

    def forward(self, x):
        self.collected = []
        x, store = self.first(x), {}
        for block in self.blocks:
            x = block(x, store=store)
        if self.way == "hooks":
            added = sum(scores.mean() for scores in self.collected)
        elif self.way == "attribute":
            added = sum(block.kept for block in self.blocks)
        else:
            added = sum(scores.square().mean() for scores in store["scores"]) + store["last"].mean()
        return self.last(x) + added


@pytest.mark.parametrize("way", ["hooks", "attribute", "entry"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_what_leaves_a_unit_on_another_way_is_sent_too(way, schedule):
    report = verified(Experts(way), 3, schedule)
    assert report.loss == report.loss_microbatched and report.worst_microbatched <= ROUNDING


class Secret:
    def __init__(self):
        self.values = []


class Hides(Net):
    """Its blocks hand a tensor on in an object that nobody knows."""

    def __init__(self):
        super().__init__()
        self.secret = Secret()
        secret = self.secret

        class Writes(Block):
            def forward(self, x):
                secret.values.append(self.norm(x))
                return super().forward(x)

        self.blocks = nn.ModuleList(Writes() for _ in range(3))

    def around(self, number, x, begin):
        return x + self.secret.values[0]

    def forward(self, x):
        self.secret.values.clear()
        return super().forward(x)


class Counts(Net):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Tracks(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def around(self, number, x, begin):
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Hides, r"blocks.1 uses a tensor that blocks.0 computed.*Return it from blocks.0"),
        (Counts, "changes calls of itself from 1 to 2 in code around its units"),
        (Tracks, "writes to mean in code around its units"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(kind, message):
    with pytest.raises(pe.InvalidArgument, match=message):
        pe.Pipeline(kind(), 2, 4, loss_fn=F.mse_loss, sample=batch()[0])


@pytest.mark.parametrize("lost", ["a value", "a term"])
def test_the_check_sees_a_stage_that_computes_something_else(lost, monkeypatch):
    """A planted fault: a value is not sent on."""
    x, _ = batch()
    if lost == "a value":
        write = call_stage.Message.write

        def forgetful(message, passed):
            looks, plain, *rest = write(message, passed)
            value = len(passed) - 1
            return (looks, plain, *rest[:value], torch.full_like(rest[value], torch.nan), *rest[value + 1 :])

        monkeypatch.setattr(call_stage.Message, "write", forgetful)
    else:
        take = call_stage._StageRun._keep

        def detaching(run, number, part, tensor):
            take(run, number, part, tensor.detach())

        monkeypatch.setattr(call_stage._StageRun, "_keep", detaching)
    with pytest.raises(
        pe.InvalidArgument, match=r"the stages give .* than the model itself|where the model gives"
    ):
        pe.Pipeline(Net(), 2, 4, loss_fn=F.mse_loss, sample=x)


# -- later steps


class Sometimes(Net):
    def around(self, number, x, begin):
        return self.blocks[0](x) if number == 1 and bool(x.detach().sum() > 1000) else x


class Skips(Net):
    def forward(self, x):
        h = self.first(x)
        for block in self.blocks[: 2 if bool(x.sum() > 1000) else 4]:
            h = block(h)
        return self.last(h)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Sometimes, r"blocks.0 is called where the sample called blocks.2 \(call 3\)"),
        (Skips, "last is called where"),
    ],
)
def test_another_order_of_calls_is_refused_before_anything_is_added(kind, message):
    model, (x, y) = kind(), batch()
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, sample=x) as pipe:
        pipe.step(x, target=y)
        with pytest.raises(pe.StageError, match=message):
            pipe.step(x + 10_000, target=y)
        assert all(p.grad is None for p in model.parameters())
        pipe.step(x, target=y)


class Listed(Returned):
    def forward(self, x, y=None, every=False):
        result = super().forward(x, y)
        return result | {"first": self.first(x)} if every else result


def test_a_step_takes_batches_like_the_sample_alone():
    x, y = batch()
    with pe.Pipeline(Listed(), 2, 4, sample={"x": x, "y": y, "every": False}) as pipe:
        pipe.step(y=y, every=False, x=x)
        with pytest.raises(pe.InvalidArgument, match=r"input keyword \['every'\] is True, and was False"):
            pipe.step(x=x, y=y, every=True)
        with pytest.raises(pe.InvalidArgument, match="another structure than the sample.*x, y in place of"):
            pipe.step(x=x, y=y)


class States(Net):
    def forward(self, x, states=False):
        found = [x := self.first(x), *(x := block(x) for block in self.blocks)]
        return (self.last(x), found) if states else (self.last(x), None)


def test_outputs_that_the_sample_did_not_ask_for_are_refused_and_those_that_it_did_are_right():
    model, (x, _) = States(), batch()
    loss_fn = lambda out, target: F.mse_loss(out[0], target)  # noqa: E731
    with pe.Pipeline(model, 2, 4, loss_fn=loss_fn, sample={"x": x, "states": False}) as pipe:
        torch.testing.assert_close(pipe.eval(x=x, states=False)[0], model(x)[0])
        # Measured times decide how many calls the first stage makes.
        with pytest.raises(pe.StageError, match=r"the output holds what first( or blocks\.\d)* returned"):
            pipe.eval(x=x, states=True)
    with pe.Pipeline(model, 2, 4, loss_fn=loss_fn, sample={"x": x, "states": True}) as pipe:
        out, states = pipe.eval(x=x, states=True)
        torch.testing.assert_close((out, states), model(x, True))


def test_changes_inside_units_are_followed_and_others_refused():
    model, (x, y) = Net(), batch()
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, sample=x) as pipe:
        model.blocks[2].linear = nn.Sequential(model.blocks[2].linear, nn.Linear(8, 8))
        assert pipe.verify(x, target=y).bit_for_bit
        model.blocks[1].register_forward_hook(lambda module, args, out: out * 2)
        assert pipe.verify(x, target=y).bit_for_bit
        model.blocks[3] = Block()
        with pytest.raises(pe.InvalidArgument, match="'3' of blocks was replaced since the model was cut"):
            pipe.step(x, target=y)


class Scaled(nn.Module):
    """Two modules around units have parameters of one name."""

    def __init__(self):
        super().__init__()
        self.net, self.weight = Net(), nn.Parameter(torch.ones(2))
        self.net.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.net(x) * self.weight * self.net.weight


def test_a_parameter_around_units_that_is_replaced_is_named():
    model, (x, y) = Scaled(), batch()
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, sample=x) as pipe:
        model.net.weight = nn.Parameter(torch.zeros(2))
        with pytest.raises(pe.InvalidArgument, match="'weight' of net was replaced since the model was cut"):
            pipe.step(x, target=y)


def test_a_copy_and_a_pickle_of_the_model_know_nothing_of_the_stages():
    model, (x, y) = Net(), batch()
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, sample=x) as pipe:
        pipe.step(x, target=y)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.blocks[0]._compiled_call_impl is None
            assert torch.equal(other(x), model(x))


# -- samples, cuts and losses


def test_the_first_batch_serves_as_the_sample():
    model, (x, y) = Net(), batch()
    plain = twin(model)
    pipe = pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss)
    assert len(list(pipe.parameters())) == len(list(model.parameters()))
    assert list(pipe.state_dict()) == list(model.state_dict())
    with pytest.raises(pe.PipelineError, match="cut in the first step.*sample="):
        pipe.plan  # noqa: B018
    with pipe:
        assert pipe.verify(x, target=y).bit_for_bit
        assert pipe.num_stages == 2
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values()))


@pytest.mark.parametrize("when", ["sample", "first batch"])
def test_a_mapping_stands_for_the_keyword_inputs(when):
    x, y = batch()
    given = UserDict(x=x, y=y)  # as what a tokenizer returns
    with pe.Pipeline(Returned(), 2, 4, sample=given if when == "sample" else None) as pipe:
        assert pipe.verify(given).bit_for_bit
        assert torch.equal(pipe.eval(given)["out"], pipe.eval(x=x, y=y)["out"])
        assert torch.equal(pipe.step(given), pipe.step(**given))


@pytest.mark.parametrize("sample", ["dict", "tuple", "tensor", "rows fewer than microbatches"])
def test_a_sample_is_a_dict_a_tuple_or_a_value(sample):
    x, y = batch()
    given = {"dict": {"x": x}, "tuple": (x,), "tensor": x}.get(sample, x[:2])
    with pe.Pipeline(Net(), 2, 4, loss_fn=F.mse_loss, sample=given) as pipe:
        verify = pipe.verify(x=x, target=y) if sample == "dict" else pipe.verify(x, target=y)
        assert verify.bit_for_bit


@pytest.mark.parametrize("cuts", [["blocks.2"], ["blocks.1", "last"], [3], ["blocks.0.linear"]], ids=str)
def test_cuts_are_names_or_positions_of_calls(cuts):
    x, y = batch()
    with pe.Pipeline(Net(), microbatches=4, loss_fn=F.mse_loss, sample=x, cuts=cuts[:]) as pipe:
        assert pipe.verify(x, target=y).ok
        assert pipe.num_stages == len(cuts) + 1


def test_a_cut_at_no_call_is_refused_and_the_advice_works():
    x, _ = batch()
    with pytest.raises(
        pe.InvalidArgument, match="there is no call 'block.2' to cut at.*nearest name is 'blocks.2'"
    ):
        pe.Pipeline(Net(), microbatches=4, loss_fn=F.mse_loss, sample=x, cuts=["block.2"])
    pe.Pipeline(Net(), microbatches=4, loss_fn=F.mse_loss, sample=x, cuts=["blocks.2"]).close()


class Nested(nn.Module):
    """Two outer blocks with lists inside, as Swin and ConvNeXt have."""

    def __init__(self):
        super().__init__()
        self.outer = nn.ModuleList(nn.Sequential(*(Block(4) for _ in range(3))) for _ in range(2))

    def forward(self, x):
        for outer in self.outer:
            x = outer(x) * 0.5
        return x[:, :2]


def test_lists_in_lists_are_cut_finely_where_stages_ask_for_it():
    x, y = batch()
    with pe.Pipeline(Nested(), 4, 4, loss_fn=F.mse_loss, sample=x) as pipe:
        assert pipe.verify(x, target=y).bit_for_bit
        assert len(pipe.stage_modules) == 4
    with pytest.raises(pe.InvalidArgument, match="makes 6 calls.*num_stages of at most 6"):
        pe.Pipeline(Nested(), 7, 7, loss_fn=F.mse_loss, sample=x)


def test_the_models_own_loss_serves():
    model, (x, y) = Returned(), batch()
    with pe.Pipeline(model, 2, 4, sample={"x": x, "y": y}) as pipe:
        report = pipe.verify(x=x, y=y)
        assert report.bit_for_bit and report.ok
        loss, out = pipe.step(x=x, y=y, return_outputs=True)
        assert torch.allclose(out["out"], model(x)["out"]) and not loss.requires_grad
        with pytest.raises(pe.StageError, match="has no loss.*give loss_fn="):
            pipe.step(x=x, y=None)


@pytest.mark.parametrize("sample", [{}, {"y": None}])
def test_an_output_without_a_loss_needs_a_loss_function(sample):
    x, _ = batch()
    with pytest.raises(pe.InvalidArgument, match="has no loss.*give loss_fn="):
        pe.Pipeline(Returned(), 2, 4, sample={"x": x, **sample})


def test_gradients_buffers_and_random_state_are_as_before_when_a_pipeline_is_made():
    model, (x, _) = Batched(), batch()
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, sample=x):
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
        assert all(bool((p.grad == 1).all()) for p in model.parameters())


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_random_numbers_do_not_depend_on_the_cut(stages):
    torch.manual_seed(0)
    model, (x, y) = Drawing(), batch()
    losses = []
    for count, schedule in ((stages, "1f1b"), (2, "zb-h1")):
        with pe.Pipeline(model, count, 4, schedule, F.mse_loss, sample=x) as pipe:
            torch.manual_seed(1)
            losses.append(pipe.step(x, target=y))
    assert torch.equal(*losses)


class Recomputed(Expert):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class Global(Experts):
    """Its hooks collect in a list that no module holds, and its layers are recomputed."""

    def __init__(self):
        super().__init__("entry")
        self.blocks = nn.ModuleList(Recomputed() for _ in range(4))
        self.collected = collected = []
        for block in self.blocks:
            block.router.register_forward_hook(lambda module, args, out: collected.append(out.square()))

    def forward(self, x):
        self.collected.clear()
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        kept = sum(block.kept for block in self.blocks)
        return self.last(x) + kept + sum(scores.mean() for scores in self.collected[: len(self.blocks)])


def test_stages_that_share_a_models_memory_take_turns():
    model, (x, y) = Global(), batch()
    with pe.Pipeline(model, 3, 4, "zb-h1", F.mse_loss, sample=x, devices=["cpu"] * 3) as pipe:
        for _ in range(20):
            report = pipe.verify(x, target=y)
            assert report.loss == report.loss_microbatched and report.worst_microbatched <= ROUNDING
