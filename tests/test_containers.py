"""A container is taken apart only where that loses nothing, and later changes are followed or refused."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe


def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 2))


def batch():
    return torch.randn(8, 4), torch.randn(8, 2)


def scaled(module):
    """Replaces the forward, as mixed precision by accelerate does."""
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs) * 2


def hooked(module):
    module.register_forward_hook(lambda module, args, out: out * 2)


def pre_hooked(module):
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


class Doubling(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


class Reversed(nn.Sequential):
    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


class CodeBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.second(self.first(x).relu())


CHANGES = {
    "replaced forward": scaled,
    "hook": hooked,
    "pre-hook": pre_hooked,
    "compiled": lambda m: m.compile(),
}


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "compiled"])
def test_a_model_with_code_of_its_own_is_cut_by_its_own_forward(change):
    changed = model()
    CHANGES[change](changed)
    x, y = batch()
    with pe.Pipeline(changed, 2, 4, loss_fn=F.mse_loss, sample=x) as pipe:
        assert pipe.verify(x, target=y).bit_for_bit


def test_a_model_that_is_compiled_as_a_whole_is_refused_and_its_layers_may_be():
    x, y = batch()
    compiled = model()
    compiled.compile(backend="eager")
    with pytest.raises(pe.InvalidArgument, match=r"the model is compiled as a whole.*0\.compile\(\)"):
        pe.Pipeline(compiled, 2, 4, loss_fn=F.mse_loss, sample=x)
    layers = CodeBetween()
    layers.first.compile(backend="eager")
    with pe.Pipeline(layers, 2, 4, loss_fn=F.mse_loss, sample=x) as pipe:
        layers.second.compile(backend="eager")
        assert pipe.verify(x, target=y).bit_for_bit


@pytest.mark.parametrize("make", [CodeBetween, lambda: Doubling(*model()), lambda: Reversed(*model()[::-1])])
@pytest.mark.parametrize("options", [{"num_stages": 2}, {"cuts": [1]}], ids=str)
def test_a_class_with_code_of_its_own_is_cut_by_its_own_forward(make, options):
    x, y = batch()
    with pe.Pipeline(make(), microbatches=4, loss_fn=F.mse_loss, sample=x, **options) as pipe:
        assert pipe.verify(x, target=y).bit_for_bit


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "compiled"])
def test_a_container_inside_with_code_of_its_own_stays_whole(change):
    changed = model()
    CHANGES[change](changed[1])
    plain = twin(changed)
    CHANGES[change](plain[1]) if change == "replaced forward" else None
    x, y = batch()
    if change == "replaced forward":  # a copy's forward is the original's
        plain[1].__dict__.pop("forward")
        scaled(plain[1])
    reference_step(plain, x, y, 4, F.mse_loss)
    with pe.Pipeline(changed, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
    assert_same_gradients(changed, gradients(plain))


@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a container inside"])
@pytest.mark.parametrize("change", CHANGES)
def test_code_that_a_container_gets_later_is_refused_at_the_next_step(change, inside):
    changed = model()
    x, y = batch()
    with pe.Pipeline(changed, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
        before = gradients(changed)
        CHANGES[change](changed[1] if inside else changed)
        where = "Sequential '1'" if inside else "the model"
        for call in (lambda: pipe.step(x, target=y), lambda: pipe.eval(x)):
            with pytest.raises(pe.InvalidArgument, match=f"{where} has got .* since the model was cut"):
                call()
        assert_same_gradients(changed, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.__setitem__(2, nn.Linear(8, 2)),
        lambda m: m[1].__setitem__(0, nn.Linear(8, 8)),
        lambda m: m.append(nn.Tanh()),
    ],
    ids=["replaced", "replaced inside", "added"],
)
def test_a_layer_of_a_container_that_is_replaced_is_refused_at_the_next_step(change):
    changed = model()
    x, y = batch()
    with pe.Pipeline(changed, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
        change(changed)
        with pytest.raises(pe.InvalidArgument, match=r"since the model was cut.*make the Pipeline"):
            pipe.step(x, target=y)
    with pe.Pipeline(changed, 2, 4, loss_fn=F.mse_loss) as pipe:  # as it advises
        plain = twin(changed)
        changed.zero_grad()
        pipe.step(x, target=y)
        reference_step(plain, x, y, 4, F.mse_loss)
        assert_same_gradients(changed, gradients(plain))


def test_layers_of_a_stage_or_of_a_list_of_stages_that_are_replaced_are_refused():
    x, y = batch()
    with pe.Pipeline(model(), 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.stage_modules[1].layers[0] = nn.Linear(8, 2)
        with pytest.raises(pe.InvalidArgument, match="in stage 1 layer 0 was replaced"):
            pipe.step(x, target=y)
    stages = nn.ModuleList(model())
    with pe.Pipeline(stages, microbatches=4, loss_fn=F.mse_loss) as pipe:
        stages[2] = nn.Linear(8, 2)
        with pytest.raises(pe.InvalidArgument, match="in the list of stages layer 2 was replaced"):
            pipe.step(x, target=y)


class Chain(nn.ModuleList):
    """A list with a forward: a model, which is more than its members in order."""

    def forward(self, x):
        first, *others = self
        x = first(x)
        for layer in others:
            x = 2 * layer(x)
        return x


@pytest.mark.parametrize("options", [{"num_stages": 2}, {"num_stages": 3}, {"cuts": [1]}])
def test_a_list_with_a_forward_is_a_model(options):
    x, y = batch()
    chain, plain = Chain(model()), Chain(model())
    plain.load_state_dict(chain.state_dict())
    expected = reference_step(plain, x, y, 4, F.mse_loss)
    with pe.Pipeline(chain, microbatches=4, loss_fn=F.mse_loss, **options) as pipe:
        assert torch.equal(pipe.step(x, target=y), expected)
    assert_same_gradients(chain, gradients(plain))


def test_a_list_of_stages_that_gets_a_forward_is_refused():
    x, y = batch()
    stages = nn.ModuleList(model())
    with pe.Pipeline(stages, microbatches=4, loss_fn=F.mse_loss) as pipe:
        stages.forward = lambda x: x
        with pytest.raises(pe.InvalidArgument, match="the list of stages has got a forward since"):
            pipe.step(x, target=y)
        del stages.forward
        pipe.step(x, target=y)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Adapted(nn.Module):
    """A layer with low-rank weights beside it, as adapters add them."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.a, self.b = layer, nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.b(self.a(x))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved-1f1b"])
def test_what_changes_inside_a_layer_is_followed(schedule):
    blocks = nn.Sequential(*(Block() for _ in range(4)))
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    devices = ["cpu"] if schedule.startswith("interleaved") else None
    with pe.Pipeline(blocks, 2, 4, schedule, F.mse_loss, devices=devices) as pipe:
        pipe.step(x, target=y)
        for change in (
            lambda block: setattr(block, "up", Adapted(block.up)),
            lambda block: block.down.register_forward_hook(lambda m, a, out: out * 0.5),
            lambda block: setattr(block.down, "weight", nn.Parameter(torch.randn(4, 8))),
        ):
            for block in blocks:
                change(block)
            plain = twin(blocks)
            blocks.zero_grad()
            reference_step(plain, x, y, 4, F.mse_loss)
            pipe.step(x, target=y)
            assert_same_gradients(blocks, gradients(plain))


def test_a_parameter_without_a_gradient_is_named_once():
    class Idle(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.positions = nn.Parameter(torch.randn(4))

    x, y = torch.randn(8, 4), torch.randn(8, 4)
    with pe.Pipeline(nn.Sequential(nn.Linear(4, 4), Idle()), 2, 4, loss_fn=F.mse_loss) as pipe:
        with pytest.warns(UserWarning, match=r"no gradient reached 1\.positions"):
            pipe.step(x, target=y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.step(x, target=y)
