"""The example that cuts models of transformers, with a process for each stage."""

import sys
from pathlib import Path

import pytest
from processes import run

pytest.importorskip("transformers", reason="needs transformers, of the extra `test`")

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import huggingface as example  # noqa: E402


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_two_processes_train_as_the_unsplit_model_does(name):
    for losses in run(2, example.main, name, 4):
        for ours, unsplit in losses:
            assert ours == pytest.approx(unsplit, rel=1e-5)
        assert losses[-1][0] < losses[0][0]
