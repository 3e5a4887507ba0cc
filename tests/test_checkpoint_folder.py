"""Folders of save_checkpoint: whole whatever happens, and read without trust."""

import contextlib
import hashlib
import json
import math
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import pipeline_ext as pe
from pipeline_ext.base import files, lock
from pipeline_ext.base.lock import locked
from pipeline_ext.checkpoint import manifest, tensor_files


def made(value=None, width=8):
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    if value is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
    return model


def values_of(model):
    return {float(value) for parameter in model.parameters() for value in parameter.detach().aminmax()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "last"


@pytest.fixture
def saved(path):
    """A checkpoint with something of each kind."""
    model = made()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(8)).sum().backward()
    optimizer.step()
    pe.save_checkpoint(path, model, optimizer, step=1, random=torch.get_rng_state(), pair=(1, math.nan))
    return path


@contextlib.contextmanager
def unchanged():
    """Yields a model and an optimizer, which are the same afterwards."""
    model = made(3.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=7.0)
    yield model, optimizer
    assert values_of(model) == {3.0}
    assert optimizer.param_groups[0]["lr"] == 7.0 and not optimizer.state


# -- what comes back


def test_extra_values_come_back_exactly(path):
    tensors = [
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.arange(6).reshape(2, 3).t(),
        torch.tensor([1 + 2j], dtype=torch.complex128),
        torch.tensor([0.5]).to(torch.float8_e5m2fnuz),
        torch.tensor([math.nan, -0.0]),
        torch.tensor([True]),
    ]
    extra = {"t": tensors, "nested": {1: (2, [None]), (3,): math.inf}, "same": [tensors[0], tensors[0]]}
    pe.save_checkpoint(path, made(), **extra)
    found = pe.load_checkpoint(path, made())
    assert repr(found) == repr(extra)
    for before, after in zip(tensors, found["t"]):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        assert bytes(tensor_files._bytes(before)) == bytes(tensor_files._bytes(after))


def test_settings_of_an_optimizer_come_back_exactly(path):
    model = made()
    rate = torch.tensor(0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(torch.tensor(0.5), torch.tensor(0.75)))
    pe.save_checkpoint(path, model, optimizer)
    other = torch.optim.AdamW(model.parameters())
    pe.load_checkpoint(path, model, other)
    (group,) = other.param_groups
    assert torch.equal(group["lr"], rate)
    assert isinstance(group["betas"], tuple) and torch.equal(group["betas"][0], torch.tensor(0.5))


def test_what_cannot_be_kept_is_refused_by_name_and_nothing_is_written(path):
    sparse = made()
    sparse.register_buffer("few", torch.eye(2).to_sparse())
    with torch.device("meta"):
        empty = made()
    optimizer = torch.optim.SGD(made().parameters())
    for model, its_optimizer, said in (
        (sparse, None, "'few' is a Tensor of type .* save it as a dense tensor"),
        (empty, None, "'0.weight' is on the meta device"),
        (made(), optimizer, "not the model's"),
    ):
        with pytest.raises(pe.InvalidArgument, match=said):
            pe.save_checkpoint(path, model, its_optimizer)
    assert not list(path.parent.iterdir())


def test_large_states_are_several_files_and_tied_ones_are_written_once(path, monkeypatch):
    monkeypatch.setattr(tensor_files, "_LARGEST", 300)
    model = made()
    model[1].weight = model[0].weight
    pe.save_checkpoint(path, model)
    found = manifest.read(path)
    assert len(found.files) == 2
    assert found.tensors["0.weight"].pieces == found.tensors["1.weight"].pieces
    other = made()
    pe.load_checkpoint(path, other)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


def test_the_files_are_safetensors_that_others_read(path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    model = made()
    pe.save_checkpoint(path, model)
    (file,) = path.glob("*.safetensors")
    found = load_file(file)
    assert {name: value.tolist() for name, value in found.items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }


# -- several savers, and leftovers


def saves_in_child(path, value, times):
    child = os.fork()
    if child == 0:
        model = made(value)
        for _ in range(times):
            try:
                pe.save_checkpoint(path, model, who=value)
            except pe.PipelineError as error:
                if "is saving there" not in str(error):
                    print(error, file=sys.stderr)
                    os._exit(1)
        os._exit(0)
    return child


@pytest.fixture
def rounds(request):
    return 25 if request.config.getoption("--all") else 4


def test_of_two_savers_one_wins_whole_and_later_saves_work(path, rounds):
    for _ in range(rounds):
        children = [saves_in_child(path, value, 8) for value in (1000.0, 2000.0)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
        model = made()
        who = pe.load_checkpoint(path, model)["who"]
        assert values_of(model) == {who}
        pe.save_checkpoint(path, made(5.0), who=5.0)
        assert [entry.name for entry in path.parent.iterdir()] == ["last"]


def test_a_second_saver_is_refused_by_name(path):
    pe.save_checkpoint(path, made(1.0))
    with locked(path.with_name(".last.lock"), "is at it"):
        with pytest.raises(
            pe.PipelineError, match=f"process {os.getpid()} on .* is saving there; save from one run"
        ):
            pe.save_checkpoint(path, made(2.0))
        with pytest.raises(pe.PipelineError, match="is saving there"):
            pe.save_pretrained(made(2.0), path)
    model = made()
    pe.load_checkpoint(path, model)
    assert values_of(model) == {1.0}
    pe.save_checkpoint(path, made(2.0))


def test_what_a_dead_saver_left_does_not_stop_a_later_one(path):
    path.with_name(".last.lock").write_text("process 1 on nowhere")
    for name in (".last.saving", ".last.saving0123"):
        path.with_name(name).mkdir()
        (path.with_name(name) / "part").touch()
    pe.save_checkpoint(path, made(1.0))
    assert [entry.name for entry in path.parent.iterdir()] == ["last"]


def test_a_lock_is_nobody_s_once_its_process_is_dead(path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path, "has it"):
            os.write(writer, b"x")
            time.sleep(60)
    os.read(reader, 1)
    with pytest.raises(pe.PipelineError, match=f"process {child} on .* has it"), locked(path, "has it"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(path, "has it"):
        pass
    assert not path.exists()


def test_a_lock_that_its_holder_removes_meanwhile_is_taken_anew(path, monkeypatch):
    real = lock.fcntl.flock
    opened = []

    def flock(file, how):
        if not opened:
            path.unlink()  # by one that held it when it was opened
        opened.append(file)
        real(file, how)

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with locked(path, "has it"):
        assert len(opened) == 2
        with pytest.raises(pe.PipelineError, match="has it"), locked(path, "has it"):
            pass


def test_a_block_that_ctrl_c_has_kept_from_its_end_keeps_no_lock(path):
    with lock.holder() as held:
        block = lock.taken(held, path, "has it")
        block.__enter__()  # and Ctrl-C comes before its ``with`` statement knows of it
    with locked(path, "has it"):
        block.__exit__(None, None, None)  # at last, as its frames are freed
        with pytest.raises(pe.PipelineError, match="has it"), locked(path, "has it"):
            pass


def test_ctrl_c_is_itself_where_shutil_closes_a_file_twice(path, monkeypatch):
    pe.save_checkpoint(path, made(1.0))

    def rmtree(*args, **options):
        try:
            raise KeyboardInterrupt
        finally:
            os.close(10**6)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        pe.save_checkpoint(path, made(2.0))
    monkeypatch.undo()
    pe.load_checkpoint(path, made(3.0))


# -- crashes and full disks


@pytest.mark.parametrize("swaps", [True, False], ids=["exchange", "two names"])
def test_after_kill_at_a_random_moment_the_folder_is_whole(path, rounds, swaps, monkeypatch):
    if not swaps:  # as on file systems that cannot swap two names
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    pe.save_checkpoint(path, made(0.0), who=0.0)
    newest = 0.0
    for _ in range(rounds * 4):
        child = os.fork()
        if child == 0:
            value = newest
            while True:
                value += 1
                pe.save_checkpoint(path, made(value), who=value)
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        model = made()
        found = pe.load_checkpoint(path, model)["who"]
        assert values_of(model) == {found} and found >= newest
        assert not swaps or path.exists()
        newest = found
    pe.save_checkpoint(path, made(1.0), who=1.0)
    assert [entry.name for entry in path.parent.iterdir()] == ["last"]


@pytest.mark.parametrize("at", ["fsync", "replace", "mkdir", "unlink"])
def test_a_failure_of_the_system_leaves_the_old_one_and_nothing_else(path, at, monkeypatch):
    pe.save_checkpoint(path, made(1.0))

    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        if at == "replace":
            patch.setattr(files, "_exchange", lambda *_: False)
        if at in ("mkdir", "unlink"):
            patch.setattr(Path, "mkdir", fails)
        else:
            patch.setattr(os, at, fails)
        with pytest.raises(pe.PipelineError, match="cannot be written: .*Input/output error"):
            pe.save_checkpoint(path, made(2.0))
    model = made()
    pe.load_checkpoint(path, model)
    assert values_of(model) == {1.0}
    assert [entry.name for entry in path.parent.iterdir()] == ["last"]


FULL_DISK = textwrap.dedent("""
    import os, torch, pipeline_ext as pe
    small, large = torch.nn.Linear(8, 8), torch.nn.Linear(400, 400)
    pe.save_checkpoint("last", small, step=1)
    before = small.weight.clone()
    free = os.statvfs(".").f_bavail
    for _ in range(2):
        try:
            pe.save_checkpoint("last", large, step=2)
        except pe.PipelineError as error:
            print(error)
    assert os.listdir(".") == ["last"] and os.statvfs(".").f_bavail == free
    assert pe.load_checkpoint("last", small) == {"step": 1} and torch.equal(before, small.weight)
""")


def test_a_full_disk_is_told_and_filled_no_longer(tmp_path):
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("the system does not let this user mount a file system")
    script = f"mount -t tmpfs -o size=200k none {tmp_path} && cd {tmp_path} && exec '{sys.executable}' -"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], input=FULL_DISK, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    said = result.stdout.splitlines()
    assert len(said) == 2 and all(
        f"no space left on the disk of '{tmp_path}'; free some" in line for line in said
    )


def test_a_file_that_may_not_grow_leaves_the_old_one(path):
    pe.save_checkpoint(path, made(1.0, width=64))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(pe.PipelineError, match="cannot be written: .*File too large"):
            pe.save_checkpoint(path, made(2.0, width=64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    model = made(width=64)
    pe.load_checkpoint(path, model)
    assert values_of(model) == {1.0}
    assert [entry.name for entry in path.parent.iterdir()] == ["last"]


# -- damage


def refused(path, said):
    with unchanged() as (model, optimizer), pytest.raises(pe.InvalidArgument, match=said):
        pe.load_checkpoint(path, model, optimizer)


def test_one_flipped_bit_is_told_with_the_file(saved):
    for file in saved.iterdir():
        content = file.read_bytes()
        for at in (0, len(content) // 2, len(content) - 10):
            file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            refused(saved, f"{file.name}.* is damaged.*; give another checkpoint")
        file.write_bytes(content)
    assert pe.load_checkpoint(saved, made())["step"] == 1


def test_a_file_cut_short_longer_or_gone_is_told_by_name(saved):
    (file,) = saved.glob("*.safetensors")
    content = file.read_bytes()
    for other in (b"", content[:-1], content + b"x"):
        file.write_bytes(other)
        refused(saved, f"{file.name}' has {len(other)} bytes where {len(content)} were saved")
    file.unlink()
    refused(saved, f"{file.name}' is missing")
    os.mkfifo(file)
    refused(saved, f"{file.name}' is missing")
    file.unlink()
    file.write_bytes(content)
    whole = (saved / manifest.NAME).read_bytes()
    for keep in (0, 10, len(whole) // 2):
        (saved / manifest.NAME).write_bytes(whole[:keep])
        refused(saved, f"its {manifest.NAME} is damaged")
    (saved / manifest.NAME).unlink()
    refused(saved, f"it holds no {manifest.NAME}")


class Evil:
    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return open, (str(self.made), "w")


def test_code_in_a_folder_is_never_executed(saved, tmp_path):
    bomb = pickle.dumps(Evil(tmp_path / "made"))
    for name in (manifest.NAME, *(file.name for file in saved.glob("*.safetensors")), ".metadata", "extra.pt"):
        content = (saved / name).read_bytes() if (saved / name).exists() else None
        (saved / name).write_bytes(bomb)
        if content is None:
            pe.load_checkpoint(saved, made())
        else:
            refused(saved, "damaged|bytes where")
            (saved / name).write_bytes(content)
    (saved / manifest.NAME).unlink()
    refused(saved, r"pipeline_ext.import_dcp\(path, model, optimizer\)")
    assert not (tmp_path / "made").exists()
    pickle.loads(bomb)
    assert (tmp_path / "made").exists()


def content_of(path):
    return json.loads((path / manifest.NAME).read_bytes().split(b"\n", 1)[1])


def forge(path, body, **head):
    """Writes a manifest whose checksum is right."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    checksum = hashlib.sha256(body).hexdigest()
    head = {"format": "pipeline_ext checkpoint folder", "version": 1, "sha256": checksum} | head
    (path / manifest.NAME).write_bytes(json.dumps(head).encode() + b"\n" + body + b"\n")


def file_renamed(content, name):
    (old,) = content["files"]
    content["files"] = {name: content["files"][old]}
    for tensor in content["tensors"].values():
        for piece in tensor["pieces"]:
            piece["file"] = name


def piece(**changes):
    return lambda content: content["tensors"]["0.weight"]["pieces"][0].update(changes)


def tensor(**changes):
    return lambda content: content["tensors"]["0.weight"].update(changes)


HOSTILE = {
    "up": lambda content: file_renamed(content, "../secret.safetensors"),
    "absolute": lambda content: file_renamed(content, "/etc/secret.safetensors"),
    "nul": lambda content: file_renamed(content, "a\0.safetensors"),
    "line": lambda content: file_renamed(content, "a\n.safetensors"),
    "surrogate": lambda content: file_renamed(content, "\ud800.safetensors"),
    "manifest": lambda content: file_renamed(content, manifest.NAME),
    "negative size": lambda content: next(iter(content["files"].values())).update(size=-1),
    "huge size": lambda content: next(iter(content["files"].values())).update(size=10**30),
    "no size": lambda content: next(iter(content["files"].values())).pop("size"),
    "checksum": lambda content: next(iter(content["files"].values())).update(sha256=5),
    "no file": piece(file="other.safetensors"),
    "place": piece(at=None),
    "negative place": piece(at=-8),
    "far place": piece(at=2**62),
    "beyond the end": piece(at=10_000),
    "outside": piece(offsets=[1, 0]),
    "negative offset": piece(offsets=[-1, 0]),
    "huge offset": piece(offsets=[10**40, 0]),
    "offset of text": piece(offsets=["0", 0]),
    "offset of bool": piece(offsets=[False, 0]),
    "too few": piece(offsets=[0]),
    "a part": piece(shape=[4, 8]),
    "pieces twice": lambda content: content["tensors"]["0.weight"].update(
        pieces=content["tensors"]["0.weight"]["pieces"] * 2
    ),
    "negative shape": tensor(shape=[-8, -8]),
    "huge shape": tensor(shape=[2**62, 2**62]),
    "dimensions": tensor(shape=[1] * 10_000),
    "dtype": tensor(dtype="object"),
    "no pieces": tensor(pieces=None),
    "more": tensor(more=1),
    "tensors": lambda content: content.update(tensors=[]),
    "time": lambda content: content.update(saved="now"),
    "nothing": lambda content: content.clear(),
    "value": lambda content: content["extra"].update(step={"module": ["os", "system"]}),
    "tensor of a value": lambda content: content["extra"].update(step={"tensor": "nowhere"}),
    "tensor with a number": lambda content: content["extra"].update(step={"tensor": 3}),
    "no number": lambda content: content["extra"].update(step={"bytes": "*"}),
    "setting": lambda content: content["values"].update({"optimizer.param_groups.0.weight.lr": {"lambda": 1}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(saved, name):
    content = content_of(saved)
    HOSTILE[name](content)
    forge(saved, content)
    refused(saved, "damaged|missing")


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"7", b"[" * 100_000, b'{"a":' * 100_000, b"\xff", b"NaN", b'{"saved": NaN}', b"1" * 10_000],
    ids=range(9),
)
def test_a_body_that_is_no_manifest_is_refused(saved, body):
    forge(saved, body)
    refused(saved, f"{manifest.NAME} is damaged")


@pytest.mark.parametrize(
    "head, said",
    [
        ({"version": 2}, "has format 2 and this pipeline_ext reads formats up to 1; install"),
        ({"version": "1"}, "damaged"),
        ({"version": True}, "damaged"),
        ({"format": "other"}, "damaged, or is not of save_checkpoint"),
        ({"sha256": None}, "damaged"),
    ],
)
def test_a_foreign_head_is_refused(saved, head, said):
    forge(saved, content_of(saved), **head)
    refused(saved, said)


def test_deeply_nested_values_are_refused(saved):
    content = content_of(saved)
    content["extra"]["step"] = "HERE"
    for depth in (900, 100_000):
        deep = b'{"tuple": [' * depth + b"0" + b"]}" * depth
        forge(saved, json.dumps(content).encode().replace(b'"HERE"', deep))
        refused(saved, "damaged")


ODD = [None, True, -1, 0, 1, 2**63, 10**40, 1.5, "", "\0", "..", "\ud800", [], {}, [[]], {"tensor": "0.weight"}]


def mutate(value, chance):
    """A value of JSON with something in it changed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        changed = dict(value)
        if chance.random() < 0.1:
            changed[chance.choice(["", "..", "tensor", "0.weight"])] = changed.pop(key)
        else:
            changed[key] = mutate(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        return value[:at] + [mutate(value[at], chance)] * chance.choice([0, 1, 1, 1, 2]) + value[at + 1 :]
    return chance.choice(ODD)


def attempt(path):
    """Whether it loads; what raises must be the package's, and leaves all as it was."""
    model = made(3.0)
    optimizer = torch.optim.AdamW(model.parameters())
    try:
        pe.load_checkpoint(path, model, optimizer)
    except pe.PipelineError:
        assert values_of(model) == {3.0} and not optimizer.state
        return False
    return True


@pytest.fixture
def mutations(request):
    return 10_000 if request.config.getoption("--all") else 300


def test_mutated_manifests_raise_the_package_s_errors_alone(saved, mutations):
    chance = random.Random(1)
    original = content_of(saved)
    loaded = 0
    for _ in range(mutations):
        forge(saved, mutate(original, chance))
        loaded += attempt(saved)
    assert loaded < mutations / 2


def test_mutated_files_with_right_checksums_raise_the_package_s_errors_alone(saved, mutations):
    chance = random.Random(2)
    (file,) = saved.glob("*.safetensors")
    original, content = file.read_bytes(), content_of(saved)
    head = 8 + int.from_bytes(original[:8], "little")
    for _ in range(mutations):
        changed = bytearray(original)
        for _ in range(chance.choice([1, 1, 3])):
            changed[chance.randrange(chance.choice([8, head, len(original)]))] = chance.randrange(256)
        if chance.random() < 0.1:
            del changed[chance.randrange(len(changed)) :]
        file.write_bytes(changed)
        checksum = hashlib.sha256(changed).hexdigest()
        content["files"][file.name] = {"size": len(changed), "sha256": checksum}
        forge(saved, content)
        attempt(saved)


def test_bytes_changed_at_random_are_told(saved, mutations):
    chance = random.Random(3)
    found = sorted(saved.iterdir())
    for _ in range(mutations // 3):
        file = chance.choice(found)
        original = file.read_bytes()
        changed = bytearray(original)
        changed[chance.randrange(len(changed))] ^= chance.randrange(1, 256)
        file.write_bytes(changed)
        assert not attempt(saved) or changed.rstrip() == original.rstrip()
        file.write_bytes(original)


# -- other things in the way


def test_a_link_in_place_of_the_lock_is_not_followed(path):
    victim = path.with_name("victim")
    victim.write_text("precious")
    path.with_name(".last.lock").symlink_to(victim)
    with pytest.raises(pe.PipelineError, match="cannot be written"):
        pe.save_checkpoint(path, made())
    assert victim.read_text() == "precious"


def test_a_folder_of_an_earlier_version_is_replaced(path):
    path.mkdir()
    for name in (".metadata", "__0_0.distcp", "extra.pt"):
        (path / name).touch()
    pe.save_checkpoint(path, made(1.0))
    model = made()
    pe.load_checkpoint(path, model)
    assert values_of(model) == {1.0}
    shutil.rmtree(path)


# -- the newest of several


def test_the_newest_whole_one_is_found_and_the_damaged_ones_are_named(tmp_path):
    assert pe.newest_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10, 11, 12):
        pe.save_checkpoint(tmp_path / f"step-{step}", made(float(step)), step=step)
    (tmp_path / "notes").mkdir()
    assert pe.newest_checkpoint(tmp_path) == tmp_path / "step-12"
    (tmp_path / "step-12" / manifest.NAME).write_bytes(b"{}")
    (file,) = (tmp_path / "step-11").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning) as warned:
        path = pe.newest_checkpoint(tmp_path)
    assert path == tmp_path / "step-10" and pe.load_checkpoint(path, made())["step"] == 10
    said = sorted(str(warning.message) for warning in warned)
    assert f"step-11' is skipped: its file '{file.name}' is damaged" in said[0]
    assert "step-12' is skipped: its manifest.jsonl is damaged" in said[1]
    assert {warning.filename for warning in warned} == {__file__}
    (tmp_path / "step-10").rename(tmp_path / "a copy")  # the time is in it
    with pytest.warns(UserWarning):
        assert pe.newest_checkpoint(tmp_path) == tmp_path / "a copy"
