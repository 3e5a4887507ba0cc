"""Every schedule, on every kind of model, with one stream, lanes, two GPUs and graphs: the bits of autograd."""

import pytest
import torch
from gpu_cases import CASES, MODES, RANKS, STAGES, on_ranks, plain_twin, to_gpu
from random_orders import NAMED
from reference import gradients, reference_step
from torch import nn

import pipeline_ext as pe
from pipeline_ext import _C

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="torch sees no CUDA device"),
]

MICROBATCHES, STEPS = 8, 4  # the third step is captured, and launched from then on
TWO_PARTS = "in two parts"
IN_TWO_PARTS = [[f"{s}{kind}{m}" for kind in "FIW" for m in range(MICROBATCHES)] for s in range(STAGES)]


@pytest.mark.parametrize("schedule", [*NAMED, TWO_PARTS])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_every_step_has_the_bits_of_plain_autograd(name, mode, schedule, short_searches):
    if mode == "two devices" and GPUS < 2:
        pytest.skip(f"needs two GPUs, and torch sees {GPUS}")
    if mode == "two devices" and name == "tied":
        pytest.skip("stages on different GPUs share no parameters")
    if mode == "graphs" and name == "dropout":
        pytest.skip("a graph draws from the GPU's own generator, so no other run has the same numbers")
    case = CASES[name]
    stages = case.stages(STAGES)
    if name == "dropout":  # autograd has other numbers: those of a pipeline on one stream
        expected_of = on_one_stream(stages, case.loss_fn, schedule)
    else:
        expected_of = by_autograd(stages, case.loss_fn)
    with pipeline(stages, case.loss_fn, schedule, mode) as pipe:
        for step in range(STEPS):
            x, y = case.batch(4 * MICROBATCHES)
            for stage in stages:
                stage.zero_grad()
            torch.manual_seed(step)
            loss = pipe.step(x, target=y)
            torch.manual_seed(step)
            expected_loss, expected = expected_of(x, y)
            found = gradients(nn.Sequential(*stages))
            same = near if name == "tied" else torch.equal  # each stage sums its own part of a tied gradient
            different = [key for key in expected if not same(found[key].cpu(), expected[key].cpu())]
            assert not different, f"step {step}: {different} of {len(expected)}"
            assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
        if mode == "graphs":
            assert pipe.graph.fallback is None and pipe.graph.captured == 1


def near(found, expected):
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def pipeline(stages, loss_fn, schedule, mode):
    order = IN_TWO_PARTS if schedule == TWO_PARTS else schedule
    options = on_ranks(mode, RANKS.get(schedule, STAGES))
    return pe.Pipeline(stages, microbatches=MICROBATCHES, loss_fn=loss_fn, schedule=order, **options)


def by_autograd(stages, loss_fn):
    plain = plain_twin(stages)

    def step(x, y):
        plain.zero_grad()
        loss = reference_step(plain, to_gpu(x), to_gpu(y), MICROBATCHES, loss_fn)
        return loss, gradients(plain)

    return step


def on_one_stream(stages, loss_fn, schedule):
    twin = list(plain_twin(stages))
    pipe = pipeline(twin, loss_fn, schedule, "single stream")

    def step(x, y):
        for stage in twin:
            stage.zero_grad()
        return pipe.step(x, target=y), gradients(nn.Sequential(*twin))

    return step


def test_all_schedules_that_run_are_here():
    assert {*NAMED, "dualpipe"} == set(_C.schedule_names())
