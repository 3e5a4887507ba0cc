"""A loss_fn that is a module with parameters, where several processes share the pipeline."""

import pytest
import torch
import torch.distributed as dist
from models import chain
from processes import run
from test_trained_loss import Loss
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import pipeline_ext as pe

BATCH = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(2))


def made(tied):
    torch.manual_seed(1)
    model, loss = chain(4), Loss()
    if tied:
        loss.weight = model[0].bias
    return model, loss


def train(path, tied):
    model, loss = made(tied)
    number = 0
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
        number = mesh.get_local_rank("dp")
        with torch.no_grad():
            loss.weight += number  # replicas begin with the first one's
    else:
        mesh = dist.group.WORLD
    x, y = BATCH.chunk(dist.get_world_size() // 2, dim=1)[number]
    with pe.Pipeline(model, 2, 4, loss_fn=loss, mesh=mesh, timeout=20) as pipe:
        optimizer = torch.optim.AdamW(pipe.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            pipe.step(x, target=y)
            total = pipe.clip_grad_norm_(0.1)
            optimizer.step()
        pe.save_checkpoint(path, pipe, optimizer)
        return total, [name for name, _ in pipe.named_parameters()]


@pytest.mark.parametrize("size, tied", [(2, False), (2, True), (4, False)])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_it_is_trained_clipped_and_saved_as_in_the_unsplit_model(size, tied, tmp_path):
    model, loss = made(tied)
    both = nn.ModuleList([model, loss])
    optimizer = torch.optim.AdamW(both.parameters())
    x, y = BATCH
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        expected = nn.utils.clip_grad_norm_(both.parameters(), 0.1)
        optimizer.step()
    for total, names in run(size, train, tmp_path / "last", tied):
        torch.testing.assert_close(total, expected)
        assert ("loss_fn.weight" in names) == (names[0] != "0.weight")
    loaded, again = made(tied)
    loaded.loss_fn = again
    pe.load_checkpoint(tmp_path / "last", loaded)
    torch.testing.assert_close(again.weight, loss.weight)
    torch.testing.assert_close(loaded[0].weight, model[0].weight)
