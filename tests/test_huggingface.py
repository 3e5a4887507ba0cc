"""The example that cuts models of transformers."""

import sys
from pathlib import Path

import pytest
import torch

import pipeline_ext as pe

pytest.importorskip("transformers", reason="needs transformers, of the extra `test`")

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import huggingface as example

NAMES = ["gpt2", "llama"]


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_trains_as_the_unsplit_model_does(name):
    losses = example.main(name, steps=4)
    for ours, unsplit in losses:
        assert ours == pytest.approx(unsplit, rel=1e-5)
    assert losses[-1][0] < losses[0][0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", [[1], [1, 2], [1, 2, 3]])
def test_gradients_are_the_unsplit_model_s_wherever_it_is_cut(name, blocks):
    model, (where, *_) = example.make(name)
    cuts = [f"{where.rpartition('.')[0]}.{number}" for number in blocks]
    ids = torch.randint(example.WORDS, (4, 8))
    example.loss_fn(model(input_ids=ids).logits, ids).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with pe.Pipeline(example.cut(model, cuts), microbatches=2, loss_fn=example.loss_fn) as pipe:
        pipe.step(input_ids=ids, target=ids)
        for parameter, grad in zip(model.parameters(), expected):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_names_end_in_those_of_transformers(name):
    model, cuts = example.make(name)
    with pe.Pipeline(example.cut(model, cuts), microbatches=2) as pipe:
        assert {key.split(".", 2)[2] for key in pipe.state_dict()} == set(model.state_dict())
