"""Memory that one stream of a GPU allocated and others read: it is not handed out again too early."""

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import RANKS, STAGES, WIDTH, plain_twin
from models import encoder_and_decoders
from random_orders import NAMED
from reference import reference_step

import pipeline_ext as pe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

MICROBATCHES = 16
BATCHES = 4  # in turns: what a step finds of the step before is wrong for it


@pytest.fixture
def steps(request):
    return 200 if request.config.getoption("--all") else 8


@pytest.mark.parametrize("overlap", [False, True], ids=["a lane for each rank", "lanes"])
@pytest.mark.parametrize("schedule", NAMED)
def test_what_all_stages_hand_on_and_read_is_kept_for_each(schedule, overlap, steps, short_searches):
    stages = encoder_and_decoders(STAGES, WIDTH)
    plain = plain_twin(stages)
    options = {
        "schedule": schedule,
        "overlap": overlap,
        "devices": ["cuda:0"] * RANKS.get(schedule, STAGES),
        "trace": False,
    }
    batches = [torch.randn(2, 2 * MICROBATCHES, WIDTH) for _ in range(BATCHES)]
    expected = [_gradients(plain, x.cuda(), y.cuda()) for x, y in batches]
    wrong = []
    with pe.Pipeline(stages, microbatches=MICROBATCHES, loss_fn=F.mse_loss, **options) as pipe:
        for step in range(steps):
            x, y = batches[step % BATCHES]
            for stage in stages:
                stage.zero_grad()
            pipe.step(x, target=y)
            ours = [p.grad for stage in stages for p in stage.parameters()]
            if not all(map(torch.equal, ours, expected[step % BATCHES])):
                wrong.append(step)
    assert not wrong, f"{len(wrong)} of {steps} steps are wrong: {wrong}"


def _gradients(plain, x, y):
    plain.zero_grad()
    reference_step(plain, x, y, MICROBATCHES, F.mse_loss)
    return [p.grad.clone() for p in plain.parameters()]
