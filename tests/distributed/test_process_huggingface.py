"""Models of transformers with a process for each stage."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run
from torch import nn

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "examples")]
import huggingface
from trainers import gpt2, llama

import pipeline_ext as pe

IDS = torch.arange(32).reshape(4, 8) % 31


def train():
    return [huggingface.main(name, steps=3) for name in ("gpt2", "llama")]


def test_the_example_trains_as_in_one_process():
    first, second = run(2, train)
    assert first == second
    assert first == [pytest.approx(losses, rel=1e-5) for losses in train()]


def norms():
    """Gradient norms, and those of the gradients here, of two models; the first has a tied weight."""
    found = []
    for make in (gpt2, llama):
        torch.manual_seed(0)
        model, batch = make(), {"input_ids": IDS, "labels": IDS}
        plain = make()
        plain.load_state_dict(model.state_dict())
        plain(**batch).loss.backward()
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        with pe.Pipeline(model, 2, 2, sample=batch, mesh=dist.group.WORLD) as pipe:
            pipe.step(**batch)
            found.append((pipe.clip_grad_norm_(0.1).item(), expected.item()))
            theirs = dict(plain.named_parameters())
            for name, p in pipe.named_parameters():
                torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)
    return found


def test_clipping_counts_a_tied_weight_once():
    for ours, plain in run(2, norms)[0]:
        assert ours == pytest.approx(plain, rel=1e-5)
