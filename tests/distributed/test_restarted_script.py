"""A script that torchrun starts again goes on from its checkpoint, as docs/failure.md says."""

import json
from pathlib import Path

from launcher import torchrun

SCRIPT = Path(__file__).with_name("restarted_script.py")


def losses(folder, *args):
    folder.mkdir()
    result = torchrun(2, [SCRIPT, folder, *args], folder, restarts=1)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "losses.json").read_text())


def test_it_comes_to_the_losses_of_one_that_was_left_alone(tmp_path):
    expected = losses(tmp_path / "undisturbed", "undisturbed")
    assert len(set(expected)) == 6
    assert losses(tmp_path / "killed") == expected
