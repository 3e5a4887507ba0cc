"""A pipeline's state_dict: that of the unsplit model."""

import copy
import threading

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipeline_ext as pe


class Named(nn.Sequential):
    """Children under names of their own, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.last = nn.Linear(4, 4)


def pipeline(model, num_stages=None, **options):
    return pe.Pipeline(model, num_stages, microbatches=4, loss_fn=F.mse_loss, **options)


def same_state(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_names_are_those_of_the_unsplit_model():
    for model, options in (
        (models.chain(), {"num_stages": 3}),
        (Named(), {"cuts": ["blocks.1", "last"]}),
        (nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)), {"cuts": [1]}),
    ):
        with pipeline(model, **options) as pipe:
            assert same_state(pipe.state_dict(), model.state_dict())


def test_a_list_of_stages_is_named_as_a_sequential():
    stages = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))]
    with pipeline(stages) as pipe:
        assert list(pipe.state_dict())[:3] == ["0.weight", "0.bias", "1.0.weight"]
        assert same_state(pipe.state_dict(), nn.Sequential(*stages).state_dict())


@pytest.mark.parametrize("num_stages", [1, 4, None])
def test_a_state_goes_from_two_stages_to_any_number_and_to_the_plain_model(num_stages):
    def train(model, step, batches, optimizer_state=None):
        """Returns the optimizer's state."""
        optimizer = torch.optim.AdamW(model.parameters())
        if optimizer_state is not None:
            optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        for x, y in batches:
            optimizer.zero_grad()
            step(x, target=y)
            optimizer.step()
        return copy.deepcopy(optimizer.state_dict())

    def plain_step(x, target):
        for a, b in zip(x.tensor_split(4), target.tensor_split(4)):
            (F.mse_loss(other(a), b) / 4).backward()

    batches = [(torch.randn(8, 12), torch.randn(8, 12)) for _ in range(4)]
    model = models.chain()
    with pipeline(model, 2) as pipe:
        optimizer_state = train(model, pipe.step, batches[:3])
        state = copy.deepcopy(pipe.state_dict())
        train(model, pipe.step, batches[3:], optimizer_state)

    other = models.chain()
    if num_stages is None:
        other.load_state_dict(state)
        train(other, plain_step, batches[3:], optimizer_state)
    else:
        with pipeline(other, num_stages) as pipe:
            assert str(pipe.load_state_dict(state)) == "<All keys matched successfully>"
            train(other, pipe.step, batches[3:], optimizer_state)
    assert same_state(other.state_dict(), model.state_dict())


def test_tied_parameters_have_every_name_and_stay_tied():
    stages = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
    stages[2].weight = stages[0].weight
    with pipeline(stages) as pipe:
        pipe.step(torch.randn(8, 4), target=torch.randn(8, 4))
        state = pipe.state_dict()
        assert state["0.weight"].data_ptr() == state["2.weight"].data_ptr()
        pipe.load_state_dict({name: torch.ones_like(value) for name, value in state.items()})
        assert stages[2].weight is stages[0].weight
        assert torch.equal(stages[0].weight, torch.ones(4, 4))


def test_hooks_of_the_model_are_called():
    model = models.chain(layers=2)
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(more=1))
    model.register_load_state_dict_pre_hook(lambda module, state, *rest: state.pop("more"))
    with pipeline(model, 2) as pipe:
        assert pipe.state_dict()["more"] == 1
        pipe.load_state_dict(pipe.state_dict())


def test_missing_and_unexpected_names():
    with pipeline(models.chain(layers=2), 2) as pipe:
        state = pipe.state_dict()
        state["other"] = state.pop("0.weight")
        with pytest.raises(RuntimeError, match="Missing key.*0.weight"):
            pipe.load_state_dict(state)
        keys = pipe.load_state_dict(state, strict=False)
        assert (keys.missing_keys, keys.unexpected_keys) == (["0.weight"], ["other"])


def test_a_loss_with_parameters_is_not_part_of_it():
    class Loss(nn.Linear):
        def forward(self, output, target):
            return F.mse_loss(super().forward(output), target)

    model = models.chain(layers=2)
    with pe.Pipeline(model, 2, microbatches=2, loss_fn=Loss(12, 12)) as pipe:
        assert same_state(pipe.state_dict(), model.state_dict())


def test_refused_while_a_step_runs_and_allowed_after_it_and_when_closed():
    inside, go = threading.Event(), threading.Event()

    class Waits(nn.Linear):
        def forward(self, x):
            inside.set()
            go.wait(10)
            return super().forward(x)

    pipe = pipeline([nn.Linear(4, 4), Waits(4, 4)])
    state = pipe.state_dict()
    x = torch.randn(8, 4)
    stepping = threading.Thread(target=lambda: pipe.step(x, target=x))
    stepping.start()
    assert inside.wait(10)
    with pytest.raises(pe.PipelineError, match="state_dict was called while .* wait for it to end"):
        pipe.state_dict()
    with pytest.raises(pe.PipelineError, match="load_state_dict was called while"):
        pipe.load_state_dict(state)
    go.set()
    stepping.join()
    pipe.close()
    pipe.load_state_dict(pipe.state_dict())
