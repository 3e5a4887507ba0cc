"""A loss_fn that is a module with parameters: trained, clipped and saved with the model."""

import copy

import pytest
import torch
import torch.nn.functional as F
from models import chain
from torch import nn

import pipeline_ext as pe


class Loss(nn.Module):
    """Weighs features; counts its calls in a buffer."""

    def __init__(self, width=12):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, output, target):
        self.calls += 1
        return F.mse_loss(output * self.weight, target)


def pipeline(model, loss, num_stages=2):
    return pe.Pipeline(model, num_stages, microbatches=4, loss_fn=loss)


def batch():
    return torch.randn(8, 12), torch.randn(8, 12)


def test_its_parameters_come_last_by_names_of_their_own():
    model, loss = chain(2), Loss()
    with pipeline(model, loss) as pipe:
        named = dict(pipe.named_parameters())
        assert list(named) == [*dict(model.named_parameters()), "loss_fn.weight"]
        assert named["loss_fn.weight"] is loss.weight
        assert list(pipe.parameters())[-1] is loss.weight


def test_a_parameter_that_it_has_from_the_model_comes_once():
    model, loss = chain(2), Loss()
    loss.weight = model[0].bias
    with pipeline(model, loss) as pipe:
        assert "loss_fn.weight" not in dict(pipe.named_parameters())
        assert dict(pipe.named_parameters(remove_duplicate=False))["loss_fn.weight"] is loss.weight


def test_its_gradients_are_clipped_with_the_model_s():
    model, loss = chain(2), Loss()
    both = copy.deepcopy(nn.ModuleList([model, loss]))
    x, y = batch()
    both[1](both[0](x), y).backward()
    expected = nn.utils.clip_grad_norm_(both.parameters(), 1e-3)
    with pipeline(model, loss) as pipe:
        pipe.step(x, target=y)
        torch.testing.assert_close(pipe.clip_grad_norm_(1e-3), expected)
    torch.testing.assert_close(loss.weight.grad, both[1].weight.grad)


def test_a_checkpoint_has_it_and_its_optimizer_s_state(tmp_path):
    model, loss = chain(2), Loss()
    with pipeline(model, loss) as pipe:
        optimizer = torch.optim.AdamW(pipe.parameters())
        x, y = batch()
        pipe.step(x, target=y)
        optimizer.step()
        pe.save_checkpoint(tmp_path / "last", pipe, optimizer)
    other, again = chain(2), Loss()
    with pipeline(other, again, num_stages=1) as pipe:
        resumed = torch.optim.AdamW(pipe.parameters(), lr=1.0)
        pe.load_checkpoint(tmp_path / "last", pipe, resumed)
    assert torch.equal(again.weight, loss.weight) and again.calls == 4
    found, expected = resumed.state[again.weight], optimizer.state[loss.weight]
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_the_plain_model_loads_that_without_it_or_with_it_as_a_child(tmp_path):
    model, loss = chain(2), Loss()
    with pipeline(model, loss) as pipe:
        assert pipe.state_dict().keys() == model.state_dict().keys()
        pe.save_checkpoint(tmp_path / "last", pipe)
    plain, again = chain(2), Loss()
    pe.load_checkpoint(tmp_path / "last", plain)
    assert torch.equal(plain[0].weight, model[0].weight)
    plain.loss_fn = again
    pe.load_checkpoint(tmp_path / "last", plain)
    assert torch.equal(again.weight, loss.weight)


def test_a_checkpoint_without_it_is_refused(tmp_path):
    pe.save_checkpoint(tmp_path / "last", chain(2))
    with pipeline(chain(2), Loss()) as pipe, pytest.raises(pe.InvalidArgument, match="loss_fn.calls"):
        pe.load_checkpoint(tmp_path / "last", pipe)


def test_a_loss_without_parameters_is_not_saved(tmp_path):
    with pipeline(chain(2), nn.MSELoss()) as pipe:
        pe.save_checkpoint(tmp_path / "last", pipe)
    pe.load_checkpoint(tmp_path / "last", chain(2))


def test_a_model_with_a_layer_of_its_name_is_refused():
    model = nn.Sequential()
    model.add_module("first", nn.Linear(12, 12))
    model.add_module("loss_fn", nn.Linear(12, 12))
    with pytest.raises(pe.InvalidArgument, match="a layer 'loss_fn'"):
        pipeline(model, Loss())
