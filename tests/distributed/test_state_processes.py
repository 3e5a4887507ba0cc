"""Checkpoints, clipping and gradient scaling of a pipeline that several processes share."""

import math
from pathlib import Path

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from reference import reference_step, split
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import pipeline_ext as pe

COUNT = 4  # microbatches


def made(seed=1):
    torch.manual_seed(seed)
    return models.chain()


def batches(count):
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randn(2, 8, 12, generator=generator)) for _ in range(count)]


def pipeline(model, num_stages=2, **options):
    options = {"mesh": dist.group.WORLD if dist.is_initialized() else None, "timeout": 20} | options
    return pe.Pipeline(model, num_stages, COUNT, loss_fn=F.mse_loss, **options)


def adam(model, lr=1e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def train(step, optimizer, data):
    """Returns the losses."""
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        losses.append(step(x, y).item())
        optimizer.step()
    return losses


def step_of(pipe):
    return lambda x, y: pipe.step(x, target=y)


def plain_step(model):
    return lambda x, y: reference_step(model, x, y, COUNT, F.mse_loss)


def goes_on(path, num_stages, **options):
    """What a pipeline says when it is loaded: the losses of two more steps, what came back, and its state."""
    with pipeline(made(seed=3), num_stages, **options) as pipe:
        optimizer = adam(pipe, lr=1.0)
        extra = pe.load_checkpoint(path, pipe, optimizer)
        return train(step_of(pipe), optimizer, batches(4)[2:]), extra, pipe.state_dict()


def saves(path):
    with pipeline(made()) as pipe:
        optimizer = adam(pipe)
        train(step_of(pipe), optimizer, batches(2))
        pe.save_checkpoint(path, pipe, optimizer, step=2)


@pytest.fixture(scope="module")
def expected():
    """The losses of an unsplit model in four steps, and its state after them."""
    model = made()
    losses = train(plain_step(model), adam(model), batches(4))
    return losses, model.state_dict()


def joined(states):
    return {name: value for state in states for name, value in state.items()}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def state_of(on_meta):
    torch.manual_seed(1)
    with torch.device("meta" if on_meta else "cpu"):
        model = models.chain()
    with pipeline(model) as pipe:
        named = [name for name, _ in pipe.named_parameters()]
        assert set(named) <= set(pipe.state_dict())
        return pipe.state_dict()


@pytest.mark.parametrize("on_meta", [False, True])
def test_each_process_has_its_own_stages_under_the_unsplit_model_s_names(on_meta):
    first, second = run(2, state_of, on_meta)
    whole = made().state_dict()
    assert list(first) + list(second) == list(whole)
    assert first and second
    if not on_meta:
        assert_same(first | second, whole)


def loads_the_whole():
    whole = made(seed=3).state_dict()
    with pipeline(made()) as pipe:
        result = pipe.load_state_dict(whole)
        assert not result.missing_keys and not result.unexpected_keys
        with pytest.raises(RuntimeError, match="nothing.like.it"):
            pipe.load_state_dict(whole | {"nothing.like.it": torch.zeros(1)})
        return pipe.state_dict()


def test_a_state_of_the_whole_model_is_loaded_by_each_process_as_far_as_it_is_its_own():
    assert_same(joined(run(2, loads_the_whole)), made(seed=3).state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"num_stages": 2},
        {"num_stages": None, "cuts": [3]},
        {"num_stages": 4, "schedule": "zbv"},
        {"num_stages": 4, "schedule": "interleaved-1f1b"},
    ],
    ids=str,
)
def test_two_processes_go_on_where_two_have_stopped(options, tmp_path, expected):
    run(2, saves, tmp_path / "last")
    ends = run(2, goes_on_with, tmp_path / "last", options)
    for losses, extra, _ in ends:
        assert losses == expected[0][2:]
        assert extra == {"step": 2}
    assert_same(joined(state for _, _, state in ends), expected[1])


def goes_on_with(path, options):
    return goes_on(path, **options)


@pytest.mark.parametrize("num_stages", [1, 4])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_goes_on_where_two_have_stopped_and_two_where_one_has(num_stages, tmp_path, expected):
    run(2, saves, tmp_path / "two")
    losses, extra, state = goes_on(tmp_path / "two", num_stages)
    assert (losses, extra) == (expected[0][2:], {"step": 2})
    assert_same(state, expected[1])

    saves(tmp_path / "one")
    for losses, _, _ in run(2, goes_on, tmp_path / "one", 2):
        assert losses == expected[0][2:]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_plain_model_goes_on_where_two_processes_have_stopped(tmp_path, expected):
    run(2, saves, tmp_path / "last")
    model = made(seed=3)
    optimizer = adam(model, lr=1.0)
    pe.load_checkpoint(tmp_path / "last", model, optimizer)
    assert train(plain_step(model), optimizer, batches(4)[2:]) == expected[0][2:]


def replica_saves(path):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    with pipeline(made(), mesh=mesh) as pipe:
        pe.save_checkpoint(path, pipe)


def size_of(path: Path):
    return sum(file.stat().st_size for file in path.glob("*.distcp"))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_replicas_share_is_written_once(tmp_path):
    run(4, replica_saves, tmp_path / "four")
    model = made(seed=3)
    pe.load_checkpoint(tmp_path / "four", model)
    assert_same(model.state_dict(), made().state_dict())
    pe.save_checkpoint(tmp_path / "one", model)
    assert size_of(tmp_path / "four") < 1.1 * size_of(tmp_path / "one")


def saves_a_foreign_optimizer(path):
    with pipeline(made()) as pipe:
        foreign = nn.Linear(2, 2) if dist.get_rank() == 1 else pipe
        with pytest.raises(pe.InvalidArgument, match="a parameter of shape .* that is not the model's"):
            pe.save_checkpoint(path, pipe, adam(foreign))


def test_what_one_process_cannot_save_none_saves(tmp_path):
    run(2, saves_a_foreign_optimizer, tmp_path / "last")
    assert not list(tmp_path.iterdir())


def loads_nothing(path):
    with pipeline(made()) as pipe, pytest.raises(pe.InvalidArgument, match="there is none"):
        pe.load_checkpoint(path, pipe)


def test_a_checkpoint_that_is_not_there_is_refused_in_every_process(tmp_path):
    run(2, loads_nothing, tmp_path / "last")


def clips(norm_type):
    x, y = batches(1)[0]
    with pipeline(made()) as pipe:
        pipe.step(x, target=y)
        total = pipe.clip_grad_norm_(1e-3, norm_type)
        grads = {name: p.grad.clone() for name, p in pipe.named_parameters()}
        if dist.get_rank() == 1:
            next(pipe.parameters()).grad.fill_(math.nan)
        with pytest.raises(RuntimeError, match="non-finite"):
            pipe.clip_grad_norm_(1e-3, norm_type, error_if_nonfinite=True)
        return total, grads


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_gradients_are_clipped_by_the_norm_of_all_processes(norm_type):
    plain = made()
    x, y = batches(1)[0]
    plain_step(plain)(x, y)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 1e-3, norm_type)
    (total, first), (other, second) = run(2, clips, norm_type)
    assert torch.equal(total, other)
    torch.testing.assert_close(total, expected)
    clipped = first | second
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(clipped[name], parameter.grad)


def train_scaled(model, step, scaler, overflows):
    """Steps of which one has an infinite gradient in the parameter given, if any; returns the scales."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales = []
    for number, (x, y) in enumerate(batches(4)):
        optimizer.zero_grad()
        step(x, y)
        if number == 1 and overflows is not None:
            overflows.grad.fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def trains_scaled():
    scaler = ShardedGradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    with pipeline(made(), scaler=scaler) as pipe:
        overflows = next(pipe.parameters()) if dist.get_rank() == 0 else None
        return train_scaled(pipe, step_of(pipe), scaler, overflows), pipe.state_dict()


def test_a_step_whose_gradients_overflow_in_one_process_is_skipped_by_all():
    plain = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

    def step(x, y):
        for a, b in zip(split(x, COUNT), split(y, COUNT)):
            scaler.scale(F.mse_loss(plain(a), b) * (len(a) / len(x))).backward()

    expected = train_scaled(plain, step, scaler, next(plain.parameters()))
    assert expected == [2.0**10, 2.0**9, 2.0**9, 2.0**10]
    (scales, first), (other, second) = run(2, trains_scaled)
    assert scales == other == expected
    assert_same(first | second, plain.state_dict())
