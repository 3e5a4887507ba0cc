"""Checkpoints of a pipeline whose ranks are processes."""

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Failed, outcomes, run
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

import pipeline_ext as pe

STEPS = 4


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 12, generator=generator), torch.randn(8, 12, generator=generator)


def pipeline(model, pp, mesh=None):
    if mesh is None and dist.is_initialized():
        mesh = dist.init_device_mesh("cpu", (pp,), mesh_dim_names=("pp",))
    return pe.Pipeline(model, pp, 4, loss_fn=F.mse_loss, mesh=mesh)


def train(pipe, optimizer, steps):
    losses = []
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        losses.append(pipe.step(x, target=y).item())
        pipe.clip_grad_norm_(0.5)
        optimizer.step()
    return losses


def save(path, pp, mesh=None):
    """Trains for some steps, and saves; returns the losses of those that follow."""
    torch.manual_seed(0)
    with pipeline(models.chain(), pp, mesh) as pipe:
        optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.01)
        train(pipe, optimizer, range(STEPS))
        pe.save_checkpoint(path, pipe, optimizer, step=STEPS)
        return train(pipe, optimizer, range(STEPS, 2 * STEPS))


def save_replicas(path):
    return save(path, 2, dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))["pp"])


def resume(path, pp):
    torch.manual_seed(1)
    with pipeline(models.chain(), pp) as pipe:
        optimizer = torch.optim.AdamW(pipe.parameters())
        step = pe.load_checkpoint(path, pipe, optimizer)["step"]
        return train(pipe, optimizer, range(step, 2 * STEPS))


def test_saved_by_two_processes_one_and_four_go_on_to_the_same_losses(tmp_path):
    path = tmp_path / "last"
    expected, same = run(2, save, path, 2)
    assert expected == same
    assert resume(path, 1) == pytest.approx(expected, rel=1e-5)
    for losses in run(4, resume, path, 4):
        assert losses == pytest.approx(expected, rel=1e-5)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def test_replicas_save_each_tensor_once(tmp_path):
    run(4, save_replicas, tmp_path / "replicas")
    save(tmp_path / "one", 2)
    lengths = []
    for name in ("one", "replicas"):
        held = FileSystemReader(tmp_path / name).read_metadata()
        lengths.append(sum(entry.length for entry in held.storage_data.values()))
        files = sum(file.stat().st_size for file in (tmp_path / name).glob("*.distcp"))
        assert files == lengths[-1]
    assert lengths[0] == lengths[1]


def names(meta):
    """The names of a process's parameters, and what loading the whole model's state answers."""
    torch.manual_seed(0)
    whole = models.chain()
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    with torch.device("meta" if meta else "cpu"):
        model = models.chain()
    with pipeline(model, 2) as pipe:
        answer = str(pipe.load_state_dict(state))
        for name, parameter in pipe.named_parameters():
            assert torch.equal(parameter, state[name])
        assert list(pipe.state_dict()) == [name for name, _ in pipe.named_parameters()]
        with pytest.raises(RuntimeError, match="Unexpected key.*other"):
            pipe.load_state_dict(state | {"other": torch.ones(1)})
        return [name for name, _ in pipe.named_parameters()], answer


@pytest.mark.parametrize("meta", [False, True])
def test_each_process_has_its_stages_parameters_under_the_unsplit_names(meta):
    (first, answer), (second, _) = run(2, names, meta)
    assert first + second == [name for name, _ in models.chain().named_parameters()]
    assert answer == "<All keys matched successfully>"


def save_with_anothers_parameter(path):
    model = models.chain()
    with pipeline(model, 2) as pipe:
        other = nn.Linear(2, 2).parameters() if dist.get_rank() else ()
        pe.save_checkpoint(path, pipe, torch.optim.SGD([*pipe.parameters(), *other]))


def load_nothing(path):
    with pipeline(models.chain(), 2) as pipe:
        pe.load_checkpoint(path, pipe)


@pytest.mark.parametrize(
    "body, said", [(save_with_anothers_parameter, "not the model's"), (load_nothing, "there is none")]
)
def test_what_one_process_refuses_all_do(body, said, tmp_path):
    for outcome in outcomes(2, body, tmp_path / "last"):
        assert isinstance(outcome, Failed) and outcome.kind is pe.InvalidArgument, outcome
        assert said in outcome.message
    assert not list(tmp_path.iterdir())
