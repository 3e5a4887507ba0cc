"""What a captured step depends on: every change of it gives another key, and nothing else does."""

import gc
import random
import weakref

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from pipeline_ext.stages.context import CallerContext
from pipeline_ext.step.batch import Batch
from pipeline_ext.step.graph_key import GraphKeys, NotCapturable


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.inside = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.turned = nn.Parameter(torch.randn(4, 4).t())
        self.table = nn.Buffer(torch.randn(4, 4))
        self.mask = nn.Buffer(torch.eye(4).to_sparse())
        self.register_buffer("later", None)


class HasAProperty(nn.Module):
    """Its mode is not where modules keep it."""

    mode = True

    @property
    def training(self):
        return self.mode

    @training.setter
    def training(self, value):
        self.mode = value


def make():
    model = nn.Sequential(Block(), nn.Sequential(Block(), Block()), HasAProperty())
    model[1][1].linear.weight = model[0].linear.weight
    return model


def keys_of(model):
    """The keys, and what finds that of a step with no inputs."""
    keys, spec = GraphKeys([model], None), pytree.tree_flatten(())[1]
    batch = Batch(None, None, keep_outputs=False, keep_losses=False, record=False)
    return keys, lambda: keys.of([], spec, batch, CallerContext.of_this_thread())


CHANGES = []


def change(function):
    CHANGES.append(function)
    return function


def block(model, rng):
    return rng.choice([module for module in model.modules() if isinstance(module, Block)])


def parameter(model, rng):
    return rng.choice(list(model.parameters()))


def elsewhere(tensor):
    """The same values, in other memory."""
    return torch.empty_strided(tensor.shape, tensor.stride()).copy_(tensor)


@change
def the_data_of_a_parameter(model, rng):
    found = parameter(model, rng)
    found.data = elsewhere(found.detach())


@change
def the_strides_of_a_parameter(model, rng):
    weight = block(model, rng).linear.weight
    weight.data = weight.data.t()


@change
def the_strides_of_a_turned_parameter(model, rng):
    turned = block(model, rng).turned
    turned.data = turned.data.t()


@change
def a_parameter_with_the_same_memory(model, rng):
    owner = block(model, rng).linear
    owner.bias = nn.Parameter(owner.bias.detach(), owner.bias.requires_grad)


@change
def two_parameters_change_places(model, rng):
    found = block(model, rng)
    found.linear.weight, found.turned = found.turned, found.linear.weight


@change
def the_dictionary_of_parameters(model, rng):
    found = block(model, rng)
    found.__dict__["_parameters"] = {**found._parameters, f"p{rng.random()}": nn.Parameter(torch.ones(2))}


@change
def whether_a_parameter_is_trained(model, rng):
    found = parameter(model, rng)
    found.requires_grad_(not found.requires_grad)


@change
def whether_a_parameter_has_a_gradient(model, rng):
    found = parameter(model, rng)
    found.grad = torch.zeros_like(found) if found.grad is None else None


@change
def a_buffer(model, rng):
    found = block(model, rng)
    found.table = torch.randn(4, 4)


@change
def a_sparse_buffer(model, rng):
    found = block(model, rng)
    found.mask = torch.eye(4).to_sparse()


@change
def the_data_of_a_buffer(model, rng):
    found = block(model, rng).norm.running_mean
    found.data = elsewhere(found)


@change
def the_data_of_a_buffer_of_one_element(model, rng):
    found = block(model, rng).norm.num_batches_tracked
    found.data = elsewhere(found)


@change
def the_shape_of_a_buffer(model, rng):
    found = block(model, rng)
    found.table = found.table.view(2, -1) if len(found.table) != 2 else found.table.view(16)


@change
def the_type_of_a_buffer(model, rng):
    found = block(model, rng)
    found.table = found.table.view(torch.int32 if found.table.dtype == torch.float32 else torch.float32)


@change
def a_buffer_that_may_be_none(model, rng):
    found = block(model, rng)
    found.later = torch.ones(3) if found.later is None else None


@change
def the_mode_of_a_module(model, rng):
    found = rng.choice(list(model.modules()))
    found.training = not found.training


@change
def a_layer_that_holds_nothing(model, rng):
    block(model, rng).inside[0] = nn.ReLU()


@change
def one_layer_more(model, rng):
    block(model, rng).inside.append(nn.Identity())


@change
def a_bias_that_may_be_none(model, rng):
    owner = block(model, rng).norm
    owner.weight = nn.Parameter(torch.zeros(4)) if owner.weight is None else None


@pytest.mark.parametrize("seed", range(20))
def test_every_change_is_noticed_and_nothing_else(seed):
    rng, model = random.Random(seed), make()
    keys, key = keys_of(model)
    before = key()
    for number in range(40):
        change = CHANGES[(seed * 40 + number) % len(CHANGES)] if number % 2 else rng.choice(CHANGES)
        change(model, rng)
        after = key()
        assert after != before, change.__name__
        assert list(map(id, keys.parameters)) == list(map(id, model.parameters()))
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5)
                p.grad = None if p.grad is None else torch.ones_like(p)
        assert key() == after and hash(key()) == hash(after)
        before = after


def test_a_mode_that_comes_back_gives_the_key_of_before():
    model = make()
    _, key = keys_of(model)
    trains = key()
    assert key() is not trains and key() == trains
    model.eval()
    evaluates = key()
    assert evaluates != trains
    model.train()
    assert key() == trains


def test_a_parameter_that_comes_back_does_not():
    """Its graph may be gone; and an object may have the number of one that is no more."""
    model = make()
    _, key = keys_of(model)
    before, weight = key(), model[0].linear.weight
    model[0].linear.weight = nn.Parameter(torch.ones(4, 4))
    key()
    model[0].linear.weight = weight
    assert key() != before


def test_gradients_that_are_put_have_the_values_of_those_before():
    model = nn.Linear(2, 2)
    keys, key = keys_of(model)
    mine = [torch.full_like(p, 5.0) for p in model.parameters()]
    key()
    keys.put_gradients(mine)
    assert model.weight.grad is mine[0] and model.bias.grad is mine[1]
    model.weight.grad, model.bias.grad = torch.ones(2, 2), None
    key()
    keys.put_gradients(mine)
    assert model.weight.grad is mine[0] and model.bias.grad is mine[1]
    assert (mine[0] == 1).all() and (mine[1] == 5).all()
    key()
    keys.put_gradients([mine[0], None])
    assert model.weight.grad is mine[0] and model.bias.grad is None


def test_hooks_are_noticed_also_on_a_subclass():
    class Named(nn.Parameter):
        pass

    model = nn.Linear(2, 2)
    model.bias = Named(torch.zeros(2))
    _, key = keys_of(model)
    key()
    hook = model.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(NotCapturable, match="post-accumulate-grad hook"):
        key()
    hook.remove()
    key()


def test_scripted_modules_are_read_too():
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)))
    _, key = keys_of(model)
    before = key()
    assert key() == before
    model.eval()
    assert key() != before


def test_a_model_that_refers_to_its_keys_is_collected():
    model = make()
    model.keys, _ = keys_of(model)
    gone = weakref.ref(model)
    del model, _
    gc.collect()
    assert gone() is None
