"""The train command under torchrun: a process for each rank, one run."""

import json
import re
import signal
import subprocess
import time

import pytest
from launcher import SMALL, command, environment, torchrun, train

from pipeline_ext.base.lock import locked
from pipeline_ext.cli import main
from pipeline_ext.lm import checkpoint

STEPS = 12


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 400)
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory, text):
    """The losses of a run of one process."""
    out = tmp_path_factory.mktemp("alone")
    assert main(["train", *SMALL, "--steps", str(STEPS), "--data", str(text), "--out", str(out)]) == 0
    return losses(out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text):
    """A run of two processes: its folder, and what it printed."""
    out = tmp_path_factory.mktemp("two")
    args = [*SMALL, "--steps", STEPS, "--data", text, "--out", out, "--json", out / "summary.json"]
    result = torchrun(2, train(*args), out)
    assert result.returncode == 0, result.stderr
    return out, result


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def test_one_run_is_shown_and_written(undisturbed, alone):
    out, result = undisturbed
    for part in ("2 on 2 ranks, a process each", "validation before:", "step 1/12", "validation after:"):
        assert result.stdout.count(part) == 1, result.stdout
    assert "Traceback" not in result.stderr
    files = {"metrics.jsonl", "checkpoint.pt", "trace.json", "timeline.png", "summary.json"}
    assert {path.name for path in out.iterdir()} == files
    assert losses(out) == pytest.approx(alone, rel=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["peak_in_flight"] == [2, 1]
    assert 0 < summary["bubble_measured"] < 1 and 0 < summary["bubble_simulated"] < 1
    assert summary["val_bpb_last"] < summary["val_bpb_first"]
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    tasks = [event["name"] for event in events if event["ph"] == "X"]
    assert len(tasks) == len(set(tasks)) == 2 * 2 * 4


@pytest.mark.parametrize("step, checkpoint_before", [(8, 6), (2, 0)])
def test_after_a_process_was_killed_a_restart_goes_on_to_the_same_losses(
    tmp_path, text, undisturbed, step, checkpoint_before
):
    """From the last checkpoint, or from the beginning where there was none."""
    args = [*SMALL, "--steps", STEPS, "--data", text, "--checkpoint-every", 3]
    again = ["--out", tmp_path / "run", "--resume", "auto"]
    result = torchrun(2, train(*args, *again, dies_in=step), tmp_path, restarts=1)
    assert result.returncode == 0, result.stderr
    resumed = re.findall(r"after step (\d+)", result.stdout)
    assert resumed == ([f"{checkpoint_before}"] if checkpoint_before else [])
    assert losses(tmp_path / "run") == losses(undisturbed[0])


def test_what_was_begun_in_two_processes_goes_on_in_one_and_in_three(tmp_path, text, alone):
    args = [*SMALL, "--steps", STEPS, "--data", text, "--checkpoint-every", 2, "--out", tmp_path / "run"]
    result = torchrun(2, train(*args, dies_in=4), tmp_path)
    assert result.returncode != 0 and len(losses(tmp_path / "run")) == 3
    first = ["train", "--resume", tmp_path / "run", "--out", tmp_path / "one", "--stages", 4]
    assert main([str(part) for part in first]) == 0
    assert losses(tmp_path / "one") == pytest.approx(alone, rel=1e-5)
    many = ["--resume", tmp_path / "run", "--out", tmp_path / "many", "--stages", 3, "--schedule", "zb-h1"]
    result = torchrun(3, train(*many), tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "many") == pytest.approx(alone, rel=1e-5)


def test_what_was_begun_in_one_process_goes_on_in_two(tmp_path, text):
    begun = ["--steps", STEPS, "--data", text, "--out", tmp_path / "begun", "--stages", 1]
    assert main(["train", *SMALL, *map(str, begun)]) == 0
    more = ["--resume", tmp_path / "begun", "--steps", STEPS + 8]
    assert main(["train", *map(str, more), "--out", str(tmp_path / "one")]) == 0
    several = ["--stages", 4, "--schedule", "zbv", "--out", tmp_path / "two"]
    result = torchrun(2, train(*more, *several), tmp_path)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert len(losses(tmp_path / "two")) == STEPS + 8


def test_ctrl_c_ends_all_processes_after_the_same_step(tmp_path, text):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(2, train(*SMALL, "--steps", 100000, "--data", text, "--out", out)),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        log, deadline = out / "metrics.jsonl", time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "stopped by Ctrl-C" in shown and "validation after:" in shown, shown + errors
    assert "Error" not in errors.replace("SignalException", ""), errors
    assert checkpoint.read(out / checkpoint.NAME).step == len(losses(out)) > 2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--stages", "3"], "got 3 stages on 2 ranks (torchrun has started 2 processes, a rank each)"),
        (["--device", "cuda"], "--device is cuda, and train runs the 2 processes of torchrun on CPUs only"),
    ],
)
def test_what_does_not_suit_the_processes_is_refused_in_a_sentence(tmp_path, text, args, message):
    result = torchrun(2, train(*SMALL, "--data", text, *args), tmp_path)
    assert result.returncode != 0 and message in result.stderr
    assert "step" not in result.stdout and not (tmp_path / "runs").exists()


def test_a_second_run_in_one_folder_is_refused_in_all_its_processes(tmp_path, text):
    with locked(tmp_path / ".running", "trains here"):
        result = torchrun(2, train(*SMALL, "--data", text, "--out", tmp_path), tmp_path)
    assert result.returncode != 0
    assert result.stderr.count("pipeline-ext: this run cannot start: process ") == 2
    assert not list(tmp_path.iterdir())
