"""The state of a pipeline whose ranks are processes, and its checkpoints."""

import contextlib
import errno
import random
import threading

import models
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import die, outcomes, run
from reference import reference_step
from torch import nn

import pipeline_ext as pe
from pipeline_ext.checkpoint import tensor_files

COUNT = 4  # microbatches


def made(seed=1, device="cpu"):
    torch.manual_seed(seed)
    with torch.device(device):
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


def saves(path, replicas=1):
    """Saves after two steps, the same in each replica."""
    options = {}
    if replicas > 1:
        options["mesh"] = dist.init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("dp", "pp"))
    with pipeline(made(), **options) as pipe:
        optimizer = adam(pipe)
        train(step_of(pipe), optimizer, batches(2))
        pe.save_checkpoint(path, pipe, optimizer, step=2)


def goes_on(path, num_stages, **options):
    """What a pipeline says when it is loaded: the losses of two more steps, what came back, and its state."""
    with pipeline(made(seed=3), num_stages, **options) as pipe:
        optimizer = adam(pipe, lr=1.0)
        extra = pe.load_checkpoint(path, pipe, optimizer)
        return train(step_of(pipe), optimizer, batches(4)[2:]), extra, pipe.state_dict()


@pytest.fixture(scope="module")
def expected():
    """The losses of an unsplit model in four steps, and its state after them."""
    model = made()
    losses = train(plain_step(model), adam(model), batches(4))
    return losses, model.state_dict()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where two processes have saved."""
    path = tmp_path_factory.mktemp("checkpoint") / "last"
    run(2, saves, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["last"]
    return path


def assert_goes_on(ends, expected):
    """``ends``: what ``goes_on`` returns in each process."""
    losses, whole = expected
    for found, extra, _ in ends:
        assert (found, extra) == (losses[2:], {"step": 2})
    assert_same({name: value for *_, state in ends for name, value in state.items()}, whole)


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# -- names


def names(device):
    """What a process holds, and what it says to a state of the whole model."""
    whole = made(seed=3).state_dict()
    with pipeline(made(device=device)) as pipe:
        state = {name: value.clone() for name, value in pipe.state_dict().items()}
        assert list(state) == [name for name, _ in pipe.named_parameters()]
        answer = str(pipe.load_state_dict(whole))
        assert_same(pipe.state_dict(), {name: whole[name] for name in state})
        with pytest.raises(RuntimeError, match="Unexpected key.*nothing.like.it"):
            pipe.load_state_dict(whole | {"nothing.like.it": torch.zeros(1)})
        return state, answer


def names_of_both():
    return [names(device) for device in ("cpu", "meta")]


def test_each_process_has_its_own_stages_under_the_unsplit_names_and_loads_them_from_the_whole():
    whole = made().state_dict()
    (here, here_of_meta), (there, there_of_meta) = run(2, names_of_both)
    for (first, answer), (second, _) in ((here, there), (here_of_meta, there_of_meta)):
        assert first and second and list(first) + list(second) == list(whole)
        assert answer == "<All keys matched successfully>"
    assert_same(here[0] | there[0], whole)


# -- checkpoints


WAYS = [
    {"num_stages": 2},
    {"num_stages": None, "cuts": [3]},
    {"num_stages": 4, "schedule": "zbv"},
    {"num_stages": 4, "schedule": "interleaved-1f1b"},
]


def go_on(path):
    return [goes_on(path, **way) for way in WAYS]


def test_two_processes_go_on_where_two_have_stopped(saved, expected):
    for ends in zip(*run(2, go_on, saved)):
        assert_goes_on(ends, expected)


def test_four_processes_go_on_where_two_have_stopped(saved, expected):
    assert_goes_on(run(4, goes_on, saved, 4), expected)


@pytest.mark.parametrize("num_stages", [1, 4])
def test_one_process_goes_on_where_two_have_stopped(num_stages, saved, expected):
    assert_goes_on([goes_on(saved, num_stages)], expected)


def test_two_processes_go_on_where_one_has_stopped(tmp_path, expected):
    saves(tmp_path / "one")
    assert_goes_on(run(2, goes_on, tmp_path / "one", 2), expected)


def assert_plain_model_goes_on(path, expected):
    model = made(seed=3)
    optimizer = adam(model, lr=1.0)
    pe.load_checkpoint(path, model, optimizer)
    assert train(plain_step(model), optimizer, batches(4)[2:]) == expected[0][2:]


def test_the_plain_model_goes_on_where_two_processes_have_stopped(saved, expected):
    assert_plain_model_goes_on(saved, expected)


def test_what_replicas_share_is_written_once(tmp_path, saved, expected):
    run(4, saves, tmp_path / "four", 2)
    assert_plain_model_goes_on(tmp_path / "four", expected)
    two, four = map(written, (saved, tmp_path / "four"))
    assert len(two) == 2 and len(four) == 4  # the work is shared out
    assert sum(two) == sum(four) and max(four) < 0.6 * max(two)


def written(path):
    """The bytes of tensors in each file."""
    sizes = []
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        sizes.append(len(content) - 8 - int.from_bytes(content[:8], "little"))
    return sizes


def is_refused(path):
    """In both processes, one of which has an optimizer of another model's."""
    with pipeline(made()) as pipe:
        foreign = nn.Linear(2, 2) if dist.get_rank() == 1 else pipe
        with pytest.raises(pe.InvalidArgument, match="a parameter of shape .* that is not the model's"):
            pe.save_checkpoint(path, pipe, adam(foreign))
        with pytest.raises(pe.InvalidArgument, match="there is none"):
            pe.load_checkpoint(path, pipe)


def test_what_one_process_cannot_save_none_saves_and_what_is_not_there_none_loads(tmp_path):
    run(2, is_refused, tmp_path / "last")
    assert not list(tmp_path.iterdir())


# -- crashes, and what goes wrong in one process


def dies_while_saving(path, first, seconds):
    """Process 0 or 1 is killed at a moment of one of many saves."""
    if dist.get_rank() == int(seconds * 1e6) % 2:
        threading.Timer(seconds, die).start()
    model = made()
    for number in range(first, first + 1000):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        with contextlib.suppress(pe.PipelineError):  # once the other is gone
            pe.save_checkpoint(path, model, number=number)


def test_after_a_process_is_killed_the_folder_is_whole(tmp_path, request):
    path = tmp_path / "last"
    pe.save_checkpoint(path, made(), number=0)
    newest = 0
    for _ in range(60 if request.config.getoption("--all") else 3):
        outcomes(2, dies_while_saving, path, newest + 1, random.uniform(0, 0.2), timeout=3)
        model = made()
        found = pe.load_checkpoint(path, model)["number"]
        assert found >= newest
        if found:
            assert {float(value) for p in model.parameters() for value in p.detach().aminmax()} == {found}
        newest = found
    run(2, saves, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def saves_to_a_path_of_its_own(path):
    with pytest.raises(
        pe.InvalidArgument, match="process 1 saves to '.*1' and process 0 to '.*0'; give all pr"
    ):
        pe.save_checkpoint(path / str(dist.get_rank()), made())


def test_processes_that_save_to_different_paths_are_refused(tmp_path):
    run(2, saves_to_a_path_of_its_own, tmp_path)
    assert not list(tmp_path.iterdir())


def fails_in_one(path):
    if dist.get_rank() == 1:
        tensor_files.os.fsync = no_space
    with pytest.raises(pe.PipelineError, match="cannot be written: no space left on the disk of"):
        pe.save_checkpoint(path, made())


def no_space(_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_for_one_process_leaves_the_old_one(tmp_path):
    path = tmp_path / "last"
    pe.save_checkpoint(path, made(seed=5), number=5)
    run(2, fails_in_one, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]
    model = made()
    assert pe.load_checkpoint(path, model) == {"number": 5}
    assert_same(model.state_dict(), made(seed=5).state_dict())


def is_refused_damaged(path):
    model = made(seed=3)
    with pytest.raises(pe.InvalidArgument, match="safetensors' is damaged"):
        pe.load_checkpoint(path, model)
    assert_same(model.state_dict(), made(seed=3).state_dict())


def test_damage_to_any_file_is_told_in_all_processes(tmp_path):
    path = tmp_path / "last"
    run(2, saves, path)
    for file in path.glob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        run(3, is_refused_damaged, path)
        file.write_bytes(content)


# -- the format of torch.distributed.checkpoint


def exports(path):
    with pipeline(made()) as pipe:
        optimizer = adam(pipe)
        train(step_of(pipe), optimizer, batches(2))
        pe.export_dcp(path, pipe, optimizer)


def imports(path, num_stages):
    with pipeline(made(seed=3), num_stages) as pipe:
        optimizer = adam(pipe, lr=1.0)
        assert pe.import_dcp(path, pipe, optimizer) == {}
        return train(step_of(pipe), optimizer, batches(4)[2:])


def imports_what_does_not_fit(path):
    model = models.chain(layers=7)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(pe.InvalidArgument, match="which the model does not have"):
        pe.import_dcp(path, model)
    assert_same(model.state_dict(), before)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_two_processes_export_any_number_imports(tmp_path, expected):
    run(2, exports, tmp_path / "last")
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]
    losses = expected[0][2:]
    assert run(4, imports, tmp_path / "last", 4) == [losses] * 4
    assert imports(tmp_path / "last", 1) == losses
    run(2, imports_what_does_not_fit, tmp_path / "last")
