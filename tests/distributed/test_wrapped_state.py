"""Checkpoints and clipping of stages in fully_shard or DistributedDataParallel: those of the unsplit model."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import chain
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import pipeline_ext as pe

COUNT = 4  # microbatches

WHOLE = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(2))  # of both replicas

alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def made(seed=1):
    torch.manual_seed(seed)
    return chain()


def sharded(stage, mesh):
    for layer in stage:
        fully_shard(layer, mesh=mesh)
    return fully_shard(stage, mesh=mesh)


def partly_sharded(stage, mesh):
    fully_shard(stage[0], mesh=mesh)
    return stage


def replicated(stage, mesh):
    return DistributedDataParallel(stage, process_group=mesh.get_group())


class Wrapped:
    """A pipeline of wrapped stages with its optimizer, in processes of a mesh (pp, dp)."""

    def __init__(self, wrap, seed=1, lr=1e-3):
        pp = dist.get_world_size() // 2
        mesh = init_device_mesh("cpu", (pp, 2), mesh_dim_names=("pp", "dp"))
        self.number = mesh.get_local_rank("dp")
        layers = list(made(seed))
        size = len(layers) // pp
        stages = [wrap(nn.Sequential(*layers[i * size : (i + 1) * size]), mesh["dp"]) for i in range(pp)]
        self.names = [f"{i}.{j}" for i in range(pp) for j in range(size)]
        self.pipe = pe.Pipeline(stages, None, COUNT, loss_fn=F.mse_loss, mesh=mesh, timeout=20)
        self.optimizer = torch.optim.AdamW(self.pipe.parameters(), lr=lr)

    def backward(self):
        x, y = (part.chunk(2)[self.number] for part in WHOLE)
        self.optimizer.zero_grad()
        self.pipe.step(x, target=y)

    def train(self, steps):
        for _ in range(steps):
            self.backward()
            self.optimizer.step()

    def unsplit(self, values):
        """By the names of the model that no list of stages has numbered."""
        found = {}
        for name, value in values.items():
            stage, layer, end = name.split(".", 2)
            found[f"{self.names.index(f'{stage}.{layer}')}.{end}"] = whole(value)
        return found


def whole(value):
    return value.full_tensor().clone() if isinstance(value, DTensor) else value.clone()


def plain(seed=1, lr=1e-3):
    model = made(seed)
    return model, torch.optim.AdamW(model.parameters(), lr=lr)


def train_plain(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(WHOLE[0]), WHOLE[1]).backward()
        optimizer.step()


def numbered(model, pp):
    """The same layers as a list of stages is named, to load what that has saved."""
    layers = list(model)
    size = len(layers) // pp
    return nn.Sequential(*(nn.Sequential(*layers[i * size : (i + 1) * size]) for i in range(pp)))


def joined(found):
    return {name: value for part in found for name, value in part.items()}


def saves(path, wrap):
    wrapped = Wrapped(wrap)
    wrapped.train(2)
    pe.save_checkpoint(path, wrapped.pipe, wrapped.optimizer, step=2)
    values = wrapped.unsplit(wrapped.pipe.state_dict())
    wrapped.pipe.close()
    return values


def goes_on(path, wrap):
    wrapped = Wrapped(wrap, seed=3, lr=1.0)
    extra = pe.load_checkpoint(path, wrapped.pipe, wrapped.optimizer)
    values = wrapped.unsplit(wrapped.pipe.state_dict())
    wrapped.train(2)
    return extra, values, wrapped.unsplit(wrapped.pipe.state_dict())


@alone
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("wrap", [sharded, partly_sharded, replicated])
def test_the_plain_model_goes_on_where_wrapped_stages_have_stopped(size, wrap, tmp_path):
    values = joined(run(size, saves, tmp_path / "last", wrap))
    model, optimizer = plain(seed=3, lr=1.0)
    stages = numbered(model, size // 2)
    pe.load_checkpoint(tmp_path / "last", stages, optimizer)
    assert values.keys() == model.state_dict().keys()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    train_plain(model, optimizer, 2)
    expected, optimizer = plain()
    train_plain(expected, optimizer, 4)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@alone
@pytest.mark.parametrize("before", ["wrapped", "plain"])
@pytest.mark.parametrize("wrap", [sharded, partly_sharded, replicated])
def test_wrapped_stages_go_on_where_others_have_stopped(before, wrap, tmp_path):
    if before == "wrapped":
        values = joined(run(4, saves, tmp_path / "last", sharded))
    else:
        model, optimizer = plain()
        train_plain(model, optimizer, 2)
        values = model.state_dict()
        pe.save_checkpoint(tmp_path / "last", numbered(model, 2), optimizer, step=2)
    expected, optimizer = plain()
    train_plain(expected, optimizer, 4)
    extras, loaded, ends = zip(*run(4, goes_on, tmp_path / "last", wrap))
    assert extras == ({"step": 2},) * 4
    assert all(torch.equal(value, values[name]) for name, value in joined(loaded).items())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(joined(ends)[name], value, rtol=1e-4, atol=1e-5)


def clips(wrap, norm_type):
    wrapped = Wrapped(wrap)
    wrapped.backward()
    total = wrapped.pipe.clip_grad_norm_(1e-3, norm_type)
    grads = wrapped.unsplit({name: p.grad for name, p in wrapped.pipe.named_parameters()})
    wrapped.pipe.close()
    return total, grads


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("wrap, norm_type", [(sharded, 2.0), (sharded, math.inf), (partly_sharded, 1.0)])
def test_wrapped_stages_are_clipped_by_the_unsplit_model_s_norm(size, wrap, norm_type):
    model, _ = plain()
    F.mse_loss(model(WHOLE[0]), WHOLE[1]).backward()
    expected = nn.utils.clip_grad_norm_(model.parameters(), 1e-3, norm_type)
    totals, grads = zip(*run(size, clips, wrap, norm_type))
    for total in totals:
        assert torch.equal(total, totals[0])
    torch.testing.assert_close(totals[0], expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(joined(grads)[name], parameter.grad)
