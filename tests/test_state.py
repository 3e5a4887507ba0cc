"""Checkpoints with the unsplit model's names, and their exchange with torch.distributed.checkpoint."""

import models
import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from reference import reference_step
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import pipeline_ext as pe
from pipeline_ext.checkpoint import manifest

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def pipeline(model, num_stages=None):
    return pe.Pipeline(model, num_stages, microbatches=4, loss_fn=F.mse_loss)


def batches(count):
    return [(torch.randn(8, 12), torch.randn(8, 12)) for _ in range(count)]


def train(step, optimizer, data):
    """Returns the losses."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        losses.append(step(x, y).item())
        optimizer.step()
    return losses


def trained(num_stages=2, model=None):
    """A model and its optimizer after some steps."""
    model = models.chain() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters())
    with pipeline(model, num_stages) as pipe:
        train(lambda x, y: pipe.step(x, target=y), optimizer, batches(2))
    return model, optimizer


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    """Whether two nested values are equal, tensors to the bit."""
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def parts(path):
    """The names that a checkpoint holds."""
    found = manifest.read(path)
    return {*found.tensors, *found.values}


torchs = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("num_stages", [1, 4, None])
def test_two_stages_go_on_as_any_number_and_as_the_plain_model(num_stages, tmp_path):
    data = batches(5)
    model = models.chain()
    with pipeline(model, 2) as pipe:
        optimizer = torch.optim.AdamW(pipe.parameters())
        train(lambda x, y: pipe.step(x, target=y), optimizer, data[:2])
        pe.save_checkpoint(tmp_path / "last", pipe, optimizer, step=2)
        expected = train(lambda x, y: pipe.step(x, target=y), optimizer, data[2:])

    other = models.chain()
    its_optimizer = torch.optim.AdamW(other.parameters(), lr=1.0)
    if num_stages is None:
        assert pe.load_checkpoint(tmp_path / "last", other, its_optimizer) == {"step": 2}
        losses = train(lambda x, y: reference_step(other, x, y, 4, F.mse_loss), its_optimizer, data[2:])
    else:
        with pipeline(other, num_stages) as pipe:
            assert pe.load_checkpoint(tmp_path / "last", pipe, its_optimizer) == {"step": 2}
            losses = train(lambda x, y: pipe.step(x, target=y), its_optimizer, data[2:])
    assert losses == expected
    assert same(other.state_dict(), model.state_dict())
    assert same(its_optimizer.state_dict(), optimizer.state_dict())


@torchs
def test_torch_alone_reads_what_a_pipeline_has_exported(tmp_path):
    model, optimizer = trained()
    with pipeline(model, 2) as pipe:
        pe.export_dcp(tmp_path / "last", pipe, optimizer)
    other = models.chain()
    dcp.load(other.state_dict(), checkpoint_id=tmp_path / "last")
    assert same(other.state_dict(), model.state_dict())
    its_optimizer = torch.optim.AdamW(other.parameters())
    state = {"optimizer": get_optimizer_state_dict(other, its_optimizer, options=BY_NAME)}
    dcp.load(state, checkpoint_id=tmp_path / "last")
    set_optimizer_state_dict(other, its_optimizer, state["optimizer"], options=BY_NAME)
    assert same(its_optimizer.state_dict()["state"], optimizer.state_dict()["state"])


@torchs
def test_a_pipeline_imports_what_torch_alone_has_saved(tmp_path):
    model, optimizer = trained()
    state = get_optimizer_state_dict(model, optimizer, options=BY_NAME)
    dcp.save({**model.state_dict(), "optimizer": state}, checkpoint_id=tmp_path / "last")
    other = models.chain()
    with pipeline(other, 3) as pipe:
        its_optimizer = torch.optim.AdamW(pipe.parameters())
        with pytest.raises(pe.InvalidArgument, match=r"a pickle .* pipeline_ext.import_dcp\(path, model, opt"):
            pe.load_checkpoint(tmp_path / "last", pipe, its_optimizer)
        assert pe.import_dcp(tmp_path / "last", pipe, its_optimizer) == {}
    assert same(other.state_dict(), model.state_dict())
    assert same(its_optimizer.state_dict(), optimizer.state_dict())


def test_what_is_saved_beside_comes_back(tmp_path):
    model, optimizer = trained()
    rates = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3])
    scaler = torch.amp.GradScaler("cpu")
    extra = {
        "rates": rates.state_dict(),
        "scaler": scaler.state_dict(),
        "random": torch.get_rng_state(),
        "note": ["a", None, 2.5],
    }
    pe.save_checkpoint(tmp_path / "last", model, **extra)
    assert same(pe.load_checkpoint(tmp_path / "last", model), extra)


def test_tied_parameters_have_every_name_and_so_has_their_optimizer(tmp_path):
    def tied():
        stages = [nn.Linear(12, 12), nn.Linear(12, 12)]
        stages[1].weight = stages[0].weight
        return nn.Sequential(*stages)

    model, optimizer = trained(2, tied())
    pe.save_checkpoint(tmp_path / "last", model, optimizer)
    for name in ("0.weight", "1.weight"):
        assert {name, f"optimizer.state.{name}.exp_avg", f"optimizer.param_groups.{name}.lr"} <= parts(
            tmp_path / "last"
        )
    other, its_optimizer = trained(1, tied())
    pe.load_checkpoint(tmp_path / "last", other, its_optimizer)
    assert other[0].weight is other[1].weight
    assert same(other.state_dict(), model.state_dict())
    assert same(its_optimizer.state_dict(), optimizer.state_dict())


def test_parameters_without_optimizer_state_and_an_optimizer_that_has_not_stepped(tmp_path):
    model = models.chain()
    model[0].weight.requires_grad_(False)
    model, optimizer = trained(2, model)
    fresh = torch.optim.AdamW(model.parameters(), lr=0.5)
    for saved in (optimizer, fresh):
        pe.save_checkpoint(tmp_path / "last", model, saved)
        its_optimizer = torch.optim.AdamW(model.parameters())
        pe.load_checkpoint(tmp_path / "last", model, its_optimizer)
        assert same(its_optimizer.state_dict(), saved.state_dict())


def test_groups_of_an_optimizer_may_be_numbered_anew_but_not_mixed(tmp_path):
    def grouped(model, *groups):
        return torch.optim.SGD(
            [{"params": [p for p in model.parameters() if p.dim() == dim], "lr": dim / 10} for dim in groups],
            momentum=0.9,
        )

    model = models.chain()
    pe.save_checkpoint(tmp_path / "last", model, grouped(model, 1, 2))
    turned = grouped(model, 2, 1)
    for group in turned.param_groups:
        group["lr"] = 7.0
    pe.load_checkpoint(tmp_path / "last", model, turned)
    assert [group["lr"] for group in turned.param_groups] == [0.2, 0.1]
    model[0].bias.data.add_(1)
    before = copied(model)
    with pytest.raises(pe.InvalidArgument, match="one group .* make the groups as they were"):
        pe.load_checkpoint(tmp_path / "last", model, torch.optim.SGD(model.parameters()))
    assert same(model.state_dict(), before)


def test_what_does_not_fit_the_model_is_refused_and_changes_nothing(tmp_path):
    model, optimizer = trained()
    pe.save_checkpoint(tmp_path / "last", model, optimizer)
    for other, said in (
        (models.chain(layers=9), "it does not hold '16.weight', '16.bias', which the model has"),
        (models.chain(layers=7), "it holds '14.down.bias', .*, which the model does not have"),
        (models.chain(width=13), r"'0.weight' has the shape \[12, 12\] in it and \[13, 13\] in the model"),
    ):
        before = copied(other)
        with pipeline(other, 2) as pipe, pytest.raises(pe.InvalidArgument, match=said):
            pe.load_checkpoint(tmp_path / "last", pipe)
        assert same(other.state_dict(), before)
    with pytest.raises(pe.InvalidArgument, match="nothing that an optimizer keeps of '16"):
        other = models.chain(layers=9)
        pe.load_checkpoint(tmp_path / "last", other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(pe.InvalidArgument, match="no/where.* cannot be loaded: there is none"):
        pe.load_checkpoint(tmp_path / "no/where", model)


def test_what_cannot_be_saved_is_refused_and_leaves_what_is_there(tmp_path):
    model, _ = trained()
    other = nn.Linear(2, 3)
    for its_optimizer, extra, said in (
        (torch.optim.SGD([*model.parameters(), *other.parameters()]), {}, r"shape \[3, 2\].* not the model's"),
        (None, {"net": other}, "'net' is a torch.nn.modules.linear.Linear, .* as a state_dict"),
    ):
        with pytest.raises(pe.InvalidArgument, match=said):
            pe.save_checkpoint(tmp_path / "last", model, its_optimizer, **extra)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_never_replaced(tmp_path):
    model, _ = trained()
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(pe.InvalidArgument, match="notes.txt' is there, which belongs to no checkpoint"):
            pe.save_checkpoint(path, model)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_state_of_an_optimizer_that_is_nested_is_refused(tmp_path):
    model = models.chain()
    optimizer = torch.optim.LBFGS(model.parameters())
    x, y = batches(1)[0]

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(pe.InvalidArgument, match="LBFGS keeps .* cannot be saved by name"):
        pe.save_checkpoint(tmp_path / "last", model, optimizer)


def test_parameters_are_the_unsplit_model_s():
    model = models.chain()
    with pipeline(model, 3) as pipe:
        assert [name for name, _ in pipe.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert all(a is b for a, b in zip(pipe.parameters(), model.parameters()))
