"""The example that cuts models of transformers, with a process for each stage."""

import sys
from pathlib import Path

import pytest
from processes import run

pytest.importorskip("transformers", reason="needs transformers, of the extra `test`")

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import huggingface as example


def train():
    # The first ties its embedding to its head.
    return [example.main(name, steps=4) for name in ("gpt2", "llama")]


def test_two_processes_train_as_the_unsplit_model_does():
    first, second = run(2, train)
    assert first == second
    for losses in first:
        for ours, unsplit in losses:
            assert ours == pytest.approx(unsplit, rel=1e-5)
        assert losses[-1][0] < losses[0][0]
