"""``train --resume``: a run that was stopped goes on as if it had not been."""

import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from pipeline_ext.cli import main
from pipeline_ext.cli.display import Display
from pipeline_ext.lm import checkpoint

SMALL = "--batch 8 --context 16 --width 16 --heads 2 --microbatches 4 --threads 1".split()
STEPS = 100


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 400)
    return str(path)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, text):
    """What each step of a run that was left alone came to."""
    out = tmp_path_factory.mktemp("uninterrupted")
    train(text, "--steps", STEPS, "--out", out)
    return losses(out)


@pytest.fixture
def stopped(tmp_path, text):
    """A run folder whose checkpoint is of step 5 of 12, and its losses to step 7."""
    out = tmp_path / "run"
    with crash_after(7):
        train(text, "--steps", 12, "--checkpoint-every", 5, "--out", out)
    return out


def train(text, *args):
    assert main(["train", *SMALL, "--data", text, *map(str, args)]) == 0


def resume(out, *args):
    return main(["train", "--resume", str(out), *map(str, args)])


class Crash(Exception):
    pass


@contextlib.contextmanager
def crash_after(step):
    """Ends a run after ``step``, with no chance to save."""

    def show(display, m):
        if m.step == step:
            raise Crash

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        patch.setattr(Display, "_plain_line", show)
        yield


def losses(out):
    """Of each line of metrics.jsonl, what does not depend on time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return [(line["step"], line["loss"], line["learning_rate"]) for line in lines]


def start(text, out, *args):
    """``train`` in a process of its own; returns it when it has done a few steps."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pipeline_ext",
            "train",
            *SMALL,
            "--data",
            text,
            "--out",
            str(out),
            "--steps",
            str(STEPS),
            *args,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = out / "metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 12):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("attempt", [0, pytest.param(1, marks=pytest.mark.every)])
def test_after_ctrl_c_at_a_random_moment_the_losses_are_those_of_a_run_left_alone(
    tmp_path, text, uninterrupted, attempt
):
    process = start(text, tmp_path, "--checkpoint-every", "0")
    time.sleep(random.uniform(0, 0.05))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped by Ctrl-C" in out
    assert checkpoint.read(tmp_path / "checkpoint.pt").step == len(losses(tmp_path)) < STEPS
    assert resume(tmp_path) == 0
    assert losses(tmp_path) == uninterrupted


def test_after_kill_the_losses_are_those_of_a_run_left_alone(tmp_path, text, uninterrupted):
    process = start(text, tmp_path, "--checkpoint-every", "5")
    process.kill()
    process.communicate()
    with (tmp_path / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 9')  # a line cut short
    step = checkpoint.read(tmp_path / "checkpoint.pt").step
    assert step % 5 == 0 and 10 <= step < STEPS
    assert resume(tmp_path) == 0
    assert losses(tmp_path) == uninterrupted


@pytest.mark.parametrize(
    "options",
    [
        ["--stages", 1],
        ["--stages", 4, "--schedule", "interleaved-1f1b", "--overlap"],
        ["--stages", 3, "--schedule", "gpipe", "--checkpoint-every", 0],
    ],
)
def test_other_stages_and_schedules_give_the_same_losses(tmp_path, text, uninterrupted, options):
    with crash_after(22):
        train(text, "--steps", STEPS, "--checkpoint-every", 10, "--out", tmp_path)
    assert resume(tmp_path, *options) == 0
    assert losses(tmp_path) == uninterrupted


def test_a_resumed_run_can_be_resumed(tmp_path, text, stopped):
    whole = tmp_path / "whole"
    train(text, "--steps", 12, "--out", whole)
    with crash_after(9):
        resume(stopped, "--checkpoint-every", 1)
    assert resume(stopped) == 0
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_ctrl_c_cannot_split_the_optimizers_step(tmp_path, text, uninterrupted, register):
    """The signal comes just before and just after the parameters change."""
    count = 0

    def press(*_):
        nonlocal count
        count += 1
        if count == 20:
            signal.raise_signal(signal.SIGINT)

    hook = register(press)
    try:
        train(text, "--steps", STEPS, "--out", tmp_path)
    finally:
        hook.remove()
    assert checkpoint.read(tmp_path / "checkpoint.pt").step == len(losses(tmp_path)) == 20
    assert resume(tmp_path) == 0
    assert losses(tmp_path) == uninterrupted


def test_what_a_resumed_run_reports(tmp_path, stopped, capsys):
    assert len(losses(stopped)) == 7
    assert resume(stopped, "--json", tmp_path / "s.json") == 0
    out = capsys.readouterr().out
    assert "resumed" in out and "after step 5" in out
    assert "step 6/12" in out and "step 5/12" not in out
    assert "12 of 12, resumed after 5" in out
    summary = json.loads((tmp_path / "s.json").read_text())
    assert (summary["resumed_after"], summary["steps"]) == (5, 7)
    assert summary["loss_first"] == losses(stopped)[5][1]
    assert [step for step, *_ in losses(stopped)] == list(range(1, 13))


def test_another_folder_gets_the_whole_run_and_the_old_one_is_left_alone(tmp_path, stopped):
    before = losses(stopped)
    assert resume(stopped / "checkpoint.pt", "--out", tmp_path / "other", "--steps", 8) == 0
    assert losses(stopped) == before
    assert losses(tmp_path / "other")[:5] == before[:5]
    assert len(losses(tmp_path / "other")) == 8
    assert checkpoint.read(stopped / "checkpoint.pt").step == 5
    assert checkpoint.read(tmp_path / "other" / "checkpoint.pt").step == 8


def test_moved_data_and_other_rates_are_accepted(tmp_path, text, stopped):
    moved = tmp_path / "moved.txt"
    moved.write_bytes(Path(text).read_bytes())
    assert resume(stopped, "--data", moved, "--learning-rate", 1e-4, "--microbatches", 2) == 0
    assert losses(stopped)[5][2] < 1e-4
    assert checkpoint.read(stopped / "checkpoint.pt").options["data"] == str(moved)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--width", "32"], "--width is 16 in the checkpoint and 32 here"),
        (["--layers", "2"], "--layers is 4 in the checkpoint and 2 here"),
        (["--heads", "4"], "--heads is 2 in the checkpoint and 4 here"),
        (["--context", "8"], "--context is 16 in the checkpoint and 8 here"),
        (["--batch", "32"], "--batch is 8 in the checkpoint and 32 here"),
        (["--seed", "1"], "--seed is 0 in the checkpoint and 1 here"),
        (["--data", "other.txt"], "text.txt in the checkpoint, and other.txt here holds other bytes"),
        (["--steps", "5"], "is of step 5, so nothing is left to do for --steps 5"),
        (["--stages", "99"], "cannot be cut into 99 stages"),
        (["--resume", "nowhere"], "there is no checkpoint 'nowhere'"),
        (["--resume", "other.txt"], "'other.txt' is not a checkpoint"),
    ],
)
def test_what_cannot_be_resumed_is_refused_in_a_sentence(tmp_path, stopped, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    Path("other.txt").write_bytes(b"five quacking zephyrs jolt my wax bed\n" * 400)
    before = losses(stopped)
    assert resume(stopped, *args) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert losses(stopped) == before


def test_a_command_that_resumes_what_has_begun_can_be_given_again(tmp_path, text, capsys):
    whole = tmp_path / "whole"
    train(text, "--steps", 12, "--out", whole)
    again = ["--steps", 12, "--checkpoint-every", 5, "--out", tmp_path / "run", "--resume", "auto"]
    for crash in (3, 7):  # before there is a checkpoint, and after
        with crash_after(crash):
            train(text, *again)
    capsys.readouterr()
    train(text, *again)
    assert "after step 5" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(whole)
    train(text, *again)  # nothing is left to do
    assert "12 of 12, resumed after 12" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(whole)


def test_what_has_begun_is_looked_for_in_out_alone(text, capsys):
    assert main(["train", *SMALL, "--data", text, "--resume", "auto"]) == 2
    assert "--resume auto continues the run in --out, which is not given" in capsys.readouterr().err


def test_a_new_run_does_not_write_over_the_checkpoint_of_another(text, stopped, capsys):
    before = losses(stopped)
    assert main(["train", *SMALL, "--data", text, "--out", str(stopped)]) == 2
    assert f"continue it by --resume {stopped}" in capsys.readouterr().err
    assert losses(stopped) == before


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(tmp_path, text, capsys):
    out, whole = tmp_path / "run", tmp_path / "whole"
    train(text, "--steps", 12, "--out", whole)
    with crash_after(7):
        train(text, "--steps", 12, "--checkpoint-every", 3, "--out", out)
    file = out / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:-50])
    assert resume(out) == 0
    captured = capsys.readouterr()
    assert "checkpoint.pt' is not a checkpoint" in captured.err
    assert "the run continues from the one before" in captured.err
    assert "12 of 12, resumed after 3" in captured.out
    assert losses(out) == losses(whole)


def test_a_second_run_in_one_folder_is_refused_before_it_changes_anything(tmp_path, text, capsys):
    process = start(text, tmp_path / "run")
    written = {file.name: file.stat().st_ino for file in (tmp_path / "run").iterdir()}
    assert main(["train", *SMALL, "--data", text, "--out", str(tmp_path / "run"), "--steps", "2"]) == 2
    err = capsys.readouterr().err
    said = f"process {process.pid} on .* trains in '.*run'; give another folder with --out, or wait until"
    assert re.search(said, err) and err.count("\n") == 1
    process.send_signal(signal.SIGSTOP)
    assert {file.name: file.stat().st_ino for file in (tmp_path / "run").iterdir()} == written
    process.kill()
    process.communicate()
    train(text, "--out", tmp_path / "other", "--steps", 2)  # as the message says
    train(
        text, "--out", tmp_path / "run", "--steps", 2, "--resume", "auto"
    )  # what the dead run left does not stop it
    assert not (tmp_path / "run" / ".running").exists()
