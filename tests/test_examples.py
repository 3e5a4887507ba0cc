"""examples/train_gpt.py, as a user runs it: in one process, in two, gone on with, sampled from."""

import re
import sys
from pathlib import Path

import pytest
import torch
from launcher import torchrun

import pipeline_ext as pe

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import train_gpt as example

SCRIPT = Path(example.__file__)
SMALL = "--width 16 --heads 2 --layers 2 --context 16 --batch 8 --microbatches 4 --rate 0.01".split()


def losses(printed):
    """Step -> bits per byte."""
    return {int(n): float(x) for n, x in re.findall(r"^step +(\d+)  (\S+) bits per byte", printed, re.M)}


def weights(folder):
    model = example.gpt(context=16, width=16, heads=2, layers=2)
    pe.load_checkpoint(folder, model)
    return model.state_dict()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the script in this process; returns what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_bytes(b"the quick brown fox jumps over the lazy dog\n" * 400)

    def call(*args):
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *SMALL, "--data", "text", *map(str, args)])
        example.main()
        return capsys.readouterr().out

    return call


def test_it_learns_goes_on_where_it_stopped_and_writes_text(run):
    whole = losses(run("--steps", 40, "--out", "whole"))
    assert list(whole) == [10, 20, 30, 40]
    assert 6 < whole[10] < 8 and whole[40] < 0.7 * whole[10]

    begun = losses(run("--steps", 20, "--out", "parts"))
    gone_on = losses(run("--steps", 40, "--out", "parts", "--resume", "--stages", 4))
    assert begun | gone_on == whole
    torch.testing.assert_close(weights("parts"), weights("whole"), rtol=0, atol=0)

    assert run("--sample", "--out", "whole").startswith("def ")


def test_two_processes_come_to_the_same_weights(run, tmp_path):
    alone = losses(run("--steps", 20, "--out", "one"))
    result = torchrun(2, [SCRIPT, *SMALL, "--data", "text", "--steps", "10", "--out", "two"], tmp_path)
    assert result.returncode == 0, result.stderr
    together = losses(result.stdout)
    together |= losses(run("--steps", 20, "--out", "two", "--resume"))
    assert together == alone
    # The norm that clips is summed in each process first, and so rounded in another order.
    torch.testing.assert_close(weights("two"), weights("one"), rtol=1e-4, atol=1e-6)


def test_by_default_it_reads_the_standard_library():
    data = example.read(None)
    inputs, target = example.batch_of(3, data, rows=2, context=8)
    assert torch.equal(inputs[:, 1:], target[:, :-1])
    assert torch.equal(inputs, example.batch_of(3, data, rows=2, context=8)[0])
    assert b"import" in bytes(data[:20000].tolist())
