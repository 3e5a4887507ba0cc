"""Five hundred pipelines drawn at random: each ends with the bits of plain autograd."""

import random

import pytest
import torch
import torch.nn.functional as F
from random_runs import WIDTH, draw
from reference import assert_same_gradients, gradients, reference_step

import pipeline_ext as pe

RUNS = 50
pytestmark = pytest.mark.usefixtures("short_searches")


@pytest.mark.parametrize("seed", range(10))
def test_whatever_is_drawn_ends_with_the_right_gradients(seed):
    chance = random.Random(seed)
    done = 0
    while done < RUNS:
        ranks = chance.randint(1, 4)
        run = draw(chance, ranks)
        plain = run.plain
        try:
            pipe = pe.Pipeline(
                run.model, loss_fn=F.mse_loss, devices=["cpu"] * ranks, timeout=20, **run.options
            )
        except pe.InvalidSchedule as refused:
            assert run.options["in_flight"] is not None, (refused, run.options)
            continue
        with pipe:
            for rows in (run.rows, run.rows + 1):
                x, y = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)
                expected = reference_step(plain, x, y, pipe.microbatches, F.mse_loss)
                assert torch.equal(pipe.step(x, target=y), expected), run.options
                try:
                    assert_same_gradients(run.model, gradients(plain))
                except AssertionError as differs:
                    differs.add_note(str(run.options))
                    raise
        done += 1
