"""The train command, as a user runs it."""

import json
import math
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline_ext.cli import main
from pipeline_ext.lm import checkpoint

SMALL = "--steps 6 --batch 8 --context 16 --width 16 --heads 2 --microbatches 4".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 400)
    return str(path)


def command(*args):
    return [sys.executable, "-m", "pipeline_ext", "train", *args]


def train(cwd, *args, **options):
    return subprocess.run(command(*args), cwd=cwd, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def train_here(tmp_path, monkeypatch):
    """Runs the command in this process, which has imported torch; returns its exit status."""
    monkeypatch.chdir(tmp_path)

    def train(*args):
        try:
            return main(["train", *args])
        except SystemExit as refused:  # by argparse
            return refused.code

    return train


def test_what_it_prints_and_writes(tmp_path, text):
    result = train(tmp_path, *SMALL, "--data", text, "--json", "out/summary.json", "--out", "run")
    assert result.returncode == 0, result.stderr
    for part in (
        "2 on 2 ranks",
        "1f1b",
        "predicted",
        "8 x 16 bytes in 4 microbatches",
        "validation before:",
        "step 1/6",
        "step 6/6",
        "tokens/s",
        "ETA",
        "validation after:",
        "messages per step",
        "run/metrics.jsonl",
    ):
        assert part in result.stdout, part
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["schedule"], summary["stages"], summary["microbatches"]) == ("1f1b", 2, 4)
    assert summary["steps"] == 6
    assert (summary["loss_first"], summary["loss_last"]) == (lines[0]["loss"], lines[-1]["loss"])
    assert 7.5 < summary["val_bpb_first"] < 8.5
    assert summary["val_bpb_last"] < summary["val_bpb_first"]
    assert summary["tokens_per_second"] > 0
    ms = summary["step_ms"]
    assert 0 < ms["min"] <= ms["median"] <= ms["max"]
    assert summary["bubble_predicted"] == pytest.approx(1 / 5)
    assert 0 < summary["bubble_measured"] < 1
    assert summary["messages_per_step"] == 8
    assert summary["peak_in_flight"] == [2, 1]


def test_every_schedule_learns_the_same(tmp_path, text, train_here):
    losses = []
    for extra in (["gpipe"], ["1f1b", "--overlap"], ["interleaved-1f1b", "--stages", "4"]):
        out = tmp_path / f"{extra[0]}.json"
        arguments = ["--data", text, "--json", str(out), "--out", extra[0], "--schedule", *extra]
        assert train_here(*SMALL, *arguments) == 0
        losses.append(json.loads(out.read_text())["loss_last"])
    assert losses[0] == losses[1] == losses[2]


def test_a_schedule_that_is_chosen_is_named_with_its_times(tmp_path, text, train_here, capsys):
    out = tmp_path / "auto.json"
    auto = ["--schedule", "auto", "--device", "cpu", "--out", "auto"]
    assert train_here(*SMALL, "--data", text, "--json", str(out), *auto) == 0
    printed = capsys.readouterr().out
    assert 'schedule="auto": ' in printed and "chosen by auto" in printed
    summary = json.loads(out.read_text())
    assert summary["schedule"] == "auto"
    assert summary["schedule_chosen"] in printed
    assert summary["pipeline_ms_predicted"] > 0 and summary["pipeline_ms_measured"] > 0
    plain = tmp_path / "plain.json"
    assert train_here(*SMALL, "--data", text, "--json", str(plain), "--out", "plain") == 0
    assert json.loads(plain.read_text())["loss_last"] == summary["loss_last"]
    assert json.loads(plain.read_text())["schedule_chosen"] is None


@pytest.mark.parametrize(
    "args, message",
    [
        (["--schedule", "auto", "--pack", "auto"], 'schedule="auto" and pack="auto" would both choose'),
        (["--data", "nowhere"], "there is no file or folder 'nowhere' to train on"),
        (["--data", "tiny"], "'tiny' holds"),
        (["--schedule", "2f2b"], "there is no schedule '2f2b'"),
        (["--stages", "99"], "cannot be cut into 99 stages"),
        (["--microbatches", "9", "--batch", "8"], "--batch 8 has too few rows for --microbatches 9"),
        (["--width", "10", "--heads", "3"], "--heads 3 does not divide --width 10"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--learning-rate", "nan"], "'nan' is not a positive number"),
        (["--seed", "1" + 20 * "0"], "is not a whole number of at least 0"),
        (["--json", "."], "--json . is a folder; give the name of a file"),
        (["--out", "tiny/run"], "Not a directory: 'tiny/run'"),
        (["--device", "gpu"], "'gpu' is none of auto, cpu, cuda, cuda:0"),
        (["--device", "cuda:99"], "--device is cuda:99 and torch sees"),
        (["--device", "cpu", "--graphs"], "--graphs needs a GPU, and this run is on the CPU"),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path, text, train_here, capsys, args, message):
    (tmp_path / "tiny").write_bytes(b"ab")
    assert train_here(*SMALL, "--data", text, *args) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_checkpoint(
    tmp_path, text, train_here, capsys
):
    args = [*SMALL, "--data", text, "--checkpoint-every", "1", "--out", "out"]
    assert train_here(*args, "--learning-rate", "1e30") == 2
    error = capsys.readouterr().err
    found = re.search(r"the (loss|norm of the gradients) is (nan|inf) in step (\d+), so the training", error)
    assert found is not None, error
    steps = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == int(found[3]) - 1 and all(math.isfinite(step["loss"]) for step in steps)
    kept = checkpoint.read(tmp_path / "out" / checkpoint.NAME)
    assert kept.step == len(steps)
    assert all(tensor.isfinite().all() for tensor in kept.model.values())


def test_a_process_that_is_given_a_bad_option_prints_that_sentence_and_no_traceback(tmp_path, text):
    result = train(tmp_path, *SMALL, "--data", text, "--stages", "99")
    assert result.returncode != 0
    assert "cannot be cut into 99 stages" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_is_read(tmp_path, train_here):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_bytes(b"abc" * 100)
    assert train_here(*SMALL, "--data", str(tmp_path), "--out", "run") == 0


def test_ctrl_c_ends_with_the_closing_table(tmp_path, text):
    process = subprocess.Popen(
        command(*SMALL, "--steps", "100000", "--data", text, "--out", "run", "--json", "s.json"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert "stopped by Ctrl-C" in out and "validation after:" in out and "files written" in out
    summary = json.loads((tmp_path / "s.json").read_text())
    assert 2 < summary["steps"] == log.read_text().count("\n")
    assert summary["val_bpb_last"] is not None


def test_a_terminal_sees_a_live_bar(tmp_path, text):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        command(*SMALL, "--data", text, "--out", "run"),
        cwd=tmp_path,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert process.wait(60) == 0
    assert "━".encode() in shown and b"6/6" in shown and b"bits per byte" in shown
    assert b"step 1/6" not in shown


def test_the_console_script_is_installed():
    script = Path(sys.executable).parent / "pipeline-ext"
    result = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "train" in result.stdout
