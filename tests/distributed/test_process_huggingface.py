"""The example that cuts models of transformers, in two processes."""

import sys
from pathlib import Path

import pytest
from processes import run

pytest.importorskip("transformers", reason="needs transformers, of the extra `test`")


def train(name):
    sys.path.append(str(Path(__file__).parents[2] / "examples"))
    import huggingface

    return huggingface.main(name, steps=4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])  # of which the first ties its embedding to its head
def test_two_processes_train_as_the_unsplit_model_does(name):
    first, second = run(2, train, name)
    assert first == second
    for ours, unsplit in first:
        assert ours == pytest.approx(unsplit, rel=1e-5)
    assert first[-1][0] < first[0][0]
