"""Checkpoint files: written whole or not at all, read without trust."""

import os
import pickle
import resource
import signal
import threading
from dataclasses import asdict, replace

import pytest
import torch

from pipeline_ext import InvalidArgument, PipelineError
from pipeline_ext.lm import checkpoint
from pipeline_ext.lm.checkpoint import Checkpoint

OLD = Checkpoint(
    step=1,
    model={"0.weight": torch.randn(64, 64)},
    optimizer={"state": {0: {"exp_avg": torch.randn(64, 64)}}, "param_groups": [{"betas": (0.9, 0.95)}]},
    batches=torch.Generator().get_state(),
    random=torch.get_rng_state(),
    data="fingerprint",
    options={"steps": 6, "data": None, "overlap": False, "learning_rate": 3e-3},
    random_of_gpus=[torch.get_rng_state()],
)
NEW = replace(OLD, step=2, model={"0.weight": torch.randn(64, 64)})
VALUES = {"format": "pipeline_ext checkpoint", "version": 1, **asdict(OLD)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.pt"


def same(a, b):
    return a.step == b.step and torch.equal(a.model["0.weight"], b.model["0.weight"])


def test_what_is_written_is_read(path):
    checkpoint.write(path, OLD)
    found = checkpoint.read(path)
    assert same(found, OLD)
    assert torch.equal(found.optimizer["state"][0]["exp_avg"], OLD.optimizer["state"][0]["exp_avg"])
    assert torch.equal(found.batches, OLD.batches) and torch.equal(found.random, OLD.random)
    assert torch.equal(found.random_of_gpus[0], OLD.random_of_gpus[0])
    assert (found.optimizer["param_groups"], found.data, found.options) == (
        OLD.optimizer["param_groups"],
        OLD.data,
        OLD.options,
    )


def test_one_of_before_there_were_gpus_is_read(path):
    torch.save({key: value for key, value in VALUES.items() if key != "random_of_gpus"}, path)
    found = checkpoint.read(path)
    assert same(found, OLD) and found.random_of_gpus == []


@pytest.mark.parametrize("moment, survivor", [("write", OLD), ("fsync", OLD), ("replace", OLD), ("close", NEW)])
def test_a_crash_leaves_the_old_or_the_new_one(path, moment, survivor):
    """The process dies half-way through writing, before the sync, before and after the replacement."""
    checkpoint.write(path, OLD)
    child = os.fork()
    if child == 0:
        if moment == "write":
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the signal kills
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        else:
            setattr(os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        checkpoint.write(path, NEW)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert same(checkpoint.read(path), survivor)
    checkpoint.write(path, NEW)
    assert same(checkpoint.read(path), NEW)
    assert sorted(os.listdir(path.parent)) == [path.name, f"{path.name}.before"]


def test_a_full_disk_is_told_and_leaves_the_old_one(path):
    checkpoint.write(path, OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(PipelineError, match="cannot be written: .*too large; what was there is unch"):
            checkpoint.write(path, NEW)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert same(checkpoint.read(path), OLD)
    assert os.listdir(path.parent) == [path.name]


def test_ctrl_c_waits_until_the_file_is_written(path, monkeypatch):
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (signal.raise_signal(signal.SIGINT), real(fd)))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(path, NEW)
    assert same(checkpoint.read(path), NEW)


def test_any_thread_may_write(path):
    writer = threading.Thread(target=checkpoint.write, args=(path, NEW))
    writer.start()
    writer.join()
    assert same(checkpoint.read(path), NEW)


class Evil:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return open, (str(self.made), "w")


def test_code_in_a_file_is_never_executed(path, tmp_path):
    made = tmp_path / "made"
    torch.save({**VALUES, "options": Evil(made)}, path)
    with pytest.raises(InvalidArgument, match="refused and nothing of it executed") as caught:
        checkpoint.read(path)
    assert "\n" not in str(caught.value)
    hostile = pickle.dumps({**VALUES, "options": Evil(made)})
    path.write_bytes(hostile)
    with pytest.raises(InvalidArgument, match="is not a checkpoint"):
        checkpoint.read(path)
    assert not made.exists()
    pickle.loads(hostile)
    assert made.exists()


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.999])
def test_a_file_cut_short_is_told(path, keep):
    checkpoint.write(path, OLD)
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if keep > 1 else int(keep * len(whole))])
    with pytest.raises(InvalidArgument, match="damaged or cut short"):
        checkpoint.read(path)


def test_one_flipped_bit_in_a_tensor_is_told(path):
    checkpoint.write(path, OLD)
    content = bytearray(path.read_bytes())
    at = content.index(OLD.model["0.weight"].numpy().tobytes())
    content[at + 100] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidArgument, match="damaged or cut short"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"0.weight": torch.ones(2)}, "is not a checkpoint"),
        ([1, 2], "is not a checkpoint"),
        ({**VALUES, "optimizer": None}, "is not a checkpoint"),
        ({**VALUES, "version": 2}, "has format 2 and this pipeline_ext reads formats up to 1"),
    ],
)
def test_other_files_are_refused(path, values, message):
    torch.save(values, path)
    with pytest.raises(InvalidArgument, match=message):
        checkpoint.read(path)


def test_no_file(path):
    with pytest.raises(InvalidArgument, match="there is no checkpoint '.*checkpoint.pt'"):
        checkpoint.read(path)
    path.mkdir()
    with pytest.raises(InvalidArgument, match="cannot be read"):
        checkpoint.read(path)


def test_if_the_newest_is_damaged_the_one_before_is_read_and_that_is_said(path):
    checkpoint.write(path, OLD)
    assert checkpoint.newest(path)[1] == ""
    checkpoint.write(path, NEW)
    found, said = checkpoint.newest(path)
    assert same(found, NEW) and not said
    path.write_bytes(path.read_bytes()[:-100])
    found, said = checkpoint.newest(path)
    assert same(found, OLD)
    assert f"{path}' is not a checkpoint" in said and f"{path}.before' of step 1" in said
    path.with_name(f"{path.name}.before").unlink()
    with pytest.raises(InvalidArgument, match="damaged or cut short"):
        checkpoint.newest(path)
