"""Pipelines whose ranks are processes: the bits of plain autograd, whatever the schedule, K and the delays."""

import random
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import chain
from processes import run
from reference import gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext import _C

NAMES = [name for name in _C.schedule_names() if name != "dualpipe"]  # which has a second copy of the stages


class Delayed(nn.Module):
    """Sleeps a little, by chance, forward and backward."""

    def __init__(self, layer, seed):
        super().__init__()
        self.layer = layer
        self.chance = random.Random(seed)

    def forward(self, x):
        def wait(*_):
            time.sleep(self.chance.choice((0, 0, 0.001, 0.004)))

        wait()
        y = self.layer(x)
        if y.requires_grad:
            y.register_hook(wait)
        return y


def stages_of(name, ranks):
    return ranks if _C.layout_of(name) == "linear" else 2 * ranks


def check_steps(model, stages, microbatches, batches=2, rows=11, **options):
    """Some steps, each as that of a plain twin; returns how many messages the last one sent from here."""
    plain = twin(model)
    with pe.Pipeline(
        model, stages, microbatches, loss_fn=F.mse_loss, mesh=dist.group.WORLD, timeout=20, **options
    ) as pipe:
        mine = {p for module in pipe.stage_modules for p in module.parameters()}
        for step in range(batches):
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randn(rows + step, 12, generator=generator) for _ in range(2))
            loss = pipe.step(x, target=y)
            assert torch.equal(loss, reference_step(plain, x, y, microbatches, F.mse_loss))
            expected = gradients(plain)
            for name, p in model.named_parameters():
                if p in mine:
                    assert torch.equal(p.grad, expected[name]), (options, name)
                else:
                    assert p.grad is None
        with torch.no_grad():
            out = pipe.eval(x)
            assert out is None or torch.allclose(out, plain(x), atol=1e-6)
        return {(m.boundary, m.direction): m.count for m in pipe.trace.messages}


def every_schedule():
    ranks = dist.get_world_size()
    for name in NAMES:
        stages, microbatches = stages_of(name, ranks), 2 * ranks
        for pack in (1, 2, microbatches):
            sent = check_steps(chain(8), stages, microbatches, schedule=name, pack=pack)
            for (_, direction), count in sent.items():
                k = pack if direction == "backward" else 1
                assert count == -(-microbatches // k), (name, pack, direction)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_schedule_and_k_gives_plain_gradients_with_a_message_for_each_group(ranks):
    run(ranks, every_schedule, timeout=240)


def random_runs(seed, runs):
    chance = random.Random(seed)
    ranks = dist.get_world_size()
    for _ in range(runs):
        name = chance.choice(NAMES)
        microbatches = 2 * chance.randint(ranks, 4)
        layers = [Delayed(layer, chance.random() + dist.get_rank()) for layer in chain(8)]
        check_steps(
            nn.Sequential(*layers),
            stages_of(name, ranks),
            microbatches,
            schedule=name,
            pack=chance.randint(1, microbatches),
            pack_forward=chance.choice((1, 1, 2)),
            overlap=chance.random() < 0.3,
            reactive=True,
            rows=microbatches + chance.randint(0, 7),
        )


def test_fifty_random_runs_end_with_the_right_gradients():
    run(2, random_runs, 1, 50, timeout=240)
