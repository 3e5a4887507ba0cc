"""Pipelines whose ranks are processes: the bits of plain autograd, whatever the schedule, K and the delays."""

import contextlib
import itertools
import random

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import chain
from processes import run
from random_runs import NAMES, WIDTH, draw, stages_of
from reference import gradients, reference_step, twin

import pipeline_ext as pe


def batch(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=generator), torch.randn(rows, WIDTH, generator=generator)


def check_steps(model, plain, rows=11, **options):
    """Two steps, each as that of a plain twin; returns how many messages the last one sent from here."""
    with pe.Pipeline(model, loss_fn=F.mse_loss, mesh=dist.group.WORLD, timeout=20, **options) as pipe:
        mine = {p for module in pipe.stage_modules for p in module.parameters()}
        for step in range(2):
            x, y = batch(rows + step, step)
            loss = pipe.step(x, target=y)
            assert torch.equal(loss, reference_step(plain, x, y, pipe.microbatches, F.mse_loss))
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
            model = chain(8, WIDTH)
            options = {"num_stages": stages, "microbatches": microbatches, "schedule": name, "pack": pack}
            sent = check_steps(model, twin(model), **options)
            for (_, direction), count in sent.items():
                k = pack if direction == "backward" else 1
                assert count == -(-microbatches // k), (name, pack, direction)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_schedule_and_k_gives_plain_gradients_with_a_message_for_each_group(ranks):
    run(ranks, every_schedule, timeout=240)


def every_schedule_in_replicas():
    """Two replicas of two ranks each: a mean of sums, in another order than that of the whole batch."""
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    microbatches = 4
    for name, pack in itertools.product(NAMES, (1, 2, microbatches)):
        model = chain(8, WIDTH)
        plain = twin(model)
        with pe.Pipeline(
            model, stages_of(name, 2), microbatches, name, F.mse_loss, pack=pack, mesh=mesh, timeout=20
        ) as pipe:
            for step in range(2):
                x, y = batch(22, step)
                of_replica = (t.chunk(2)[mesh.get_local_rank("dp")] for t in (x, y))
                pipe.step(next(of_replica), target=next(of_replica))
                F.mse_loss(plain(x), y).backward()
            found = {(name, pack, of): p.grad for of, p in pipe.named_parameters()}
            torch.testing.assert_close(found, {key: plain.get_parameter(key[-1]).grad for key in found})


def test_every_schedule_and_k_in_two_replicas_gives_the_gradients_of_the_whole_batch():
    run(4, every_schedule_in_replicas, timeout=240)


def random_runs(seed, runs):
    chance = random.Random(seed)
    ranks = dist.get_world_size()
    while runs:
        drawn = draw(chance, ranks)
        with contextlib.suppress(pe.InvalidSchedule):  # not within the limits that were drawn
            check_steps(drawn.model, drawn.plain, drawn.rows, **drawn.options)
            runs -= 1


def test_fifty_random_runs_end_with_the_right_gradients():
    run(2, random_runs, 1, 50, timeout=240)
