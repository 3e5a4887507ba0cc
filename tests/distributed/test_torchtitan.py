"""torchtitan trains on this engine as on torch's own, bit for bit; only imports are changed."""

import hashlib
import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run

sys.path.append(str(Path(__file__).parents[2] / "bench"))

import titan
from titan import OURS, TORCH

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torchtitan") is None, reason="needs torchtitan"),
    pytest.mark.skipif(torch.__version__ < "2.13", reason="torchtitan 0.3.0 needs torch 2.13"),
]
TIMEOUT = 300.0  # seconds; to import torchtitan takes some
LENGTH = 16  # tokens of a row


def digests(tensors):
    return {name: hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest() for name, t in tensors.items()}


def train(package, cases):
    """By schedule and wrap: the losses and gradients of two steps, in bits."""
    titan.use(package)
    found = {}
    replica = dist.get_rank() % (dist.get_world_size() // 2)
    for schedule, wrap in cases:
        client = titan.make(schedule, wrap)
        assert type(client.schedule).__module__ == f"{package}.schedules"
        losses = [client.step(*titan.batch(LENGTH, seed)) for seed in (replica, 10 + replica)]
        found[schedule, wrap] = (losses, digests(client.gradients()))
    return found


# One test for all: most of its time is the start of the processes.
def test_losses_and_gradients_are_those_of_torch_s_own():
    cases = list(itertools.product(titan.SCHEDULES, titan.WRAPS))
    ours = run(2, train, OURS, cases, timeout=TIMEOUT)
    # Torch's split backward runs twice through a layer, which selective checkpointing refuses.
    refused = {(s, "selective checkpointing") for s in ("InterleavedZeroBubble", "ZBVZeroBubble")}
    theirs = run(2, train, TORCH, [case for case in cases if case not in refused], timeout=TIMEOUT)
    for mine, yours in zip(ours, theirs):
        for schedule, wrap in cases:
            same = (schedule, "plain") if (schedule, wrap) in refused else (schedule, wrap)
            assert mine[schedule, wrap] == yours[same], (schedule, wrap)
    for case in cases:
        assert sum(len(of_step) for mine in ours for of_step in mine[case][0]) == 2 * titan.MICROBATCHES
        assert sum(len(mine[case][1]) for mine in ours) == 45  # parameters of the model


def test_shards_on_two_replicas_have_torch_s_losses_and_gradients():
    cases = [("Interleaved1F1B", "fsdp"), ("ZBVZeroBubble", "fsdp")]
    ours, theirs = (run(4, train, package, cases, timeout=TIMEOUT) for package in (OURS, TORCH))
    assert ours == theirs


def train_with_a_loss_that_runs_backward(package, chunked):
    """The gradients of one step."""
    titan.use(package)
    client = titan.make("Interleaved1F1B", "plain", chunked_loss=chunked)
    client.step(*titan.batch(LENGTH))
    return {name: grad.numpy() for name, grad in client.gradients().items()}


def test_a_loss_that_runs_backward_itself_counts_once_in_the_first_step():
    """Torch 2.13 and 2.14 run it once more, to learn shapes, and add its gradients."""
    of_model = run(2, train_with_a_loss_that_runs_backward, OURS, False, timeout=TIMEOUT)
    chunked = run(2, train_with_a_loss_that_runs_backward, OURS, True, timeout=TIMEOUT)
    for mine, expected in zip(chunked, of_model):
        assert mine.keys() == expected.keys()
        for name, grad in mine.items():
            torch.testing.assert_close(torch.tensor(grad), torch.tensor(expected[name]), msg=name)
