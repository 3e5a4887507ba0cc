"""in_flight="auto" over processes: each measures its stages, and all follow one choice within the limit."""

import contextlib
import io

import pytest
import torch
import torch.distributed as dist
from processes import run
from reference import reference_step, twin
from slot_cases import pipeline, product
from torch import nn

import pipeline_ext as pe

WIDTH, ROWS, MICROBATCHES = 32, 8, 8
RESULT = ROWS * WIDTH * 4  # bytes of one microbatch's float32[ROWS, WIDTH]
INNER = 2 * RESULT + 512  # and what it was sent, in a buffer with its description
LAST = INNER + 8  # and two scalars


class Tanh(nn.Module):
    """Keeps its result."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x):
        return (x * self.weight).tanh()


def over_processes(model, limit, schedule):
    return pipeline(model, MICROBATCHES, limit, schedule, mesh=dist.group.WORLD, timeout=20)


def train(stages, schedule, limit):
    """Trains past the choice; returns the limits before and after, what was chosen, and what was said."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Tanh() for _ in range(stages)))
    plain = twin(model)
    said = io.StringIO()
    with over_processes(model, limit, schedule) as pipe:
        before = list(pipe.plan.limits)
        for step in range(4):
            model.zero_grad()
            plain.zero_grad()
            x, y = torch.randn(2, ROWS * MICROBATCHES, WIDTH)
            with contextlib.redirect_stdout(said):
                pipe.step(x, target=y)
            reference_step(plain, x, y, MICROBATCHES, product)
            for name, p in pipe.named_parameters():
                assert torch.equal(p.grad, plain.get_parameter(name).grad)
            assert (pipe.slot_choice is None) == (step == 0)
            alive = pipe.trace.peak_in_flight_of_stage
            assert all(a <= most for a, most in zip(alive, pipe.plan.limits))
        choice = pipe.slot_choice
        assert pipe.plan is choice.plan
        return before, list(pipe.plan.limits), choice.act_memory, str(choice), said.getvalue()


@pytest.mark.parametrize("stages, schedule", [(2, "1f1b"), (4, "interleaved-1f1b")])
def test_all_processes_follow_one_choice(stages, schedule):
    limit = [6.0 * stages * RESULT, 1e9]
    (before, after, measured, chosen, said), other = run(2, train, stages, schedule, limit)
    assert measured == [RESULT, *[INNER] * (stages - 2), LAST]
    assert after > before or stages > 2  # where more bring nothing
    assert sum(m * n for m, n in zip(measured[::2], after[::2])) <= limit[0] or stages > 2
    assert said == f"{chosen}\n"
    assert other == (before, after, measured, chosen, "")


def exceed():
    with over_processes(nn.Sequential(Tanh(), Tanh()), [2.0 * RESULT, LAST - 1.0], "1f1b") as pipe:
        x, y = torch.randn(2, ROWS * MICROBATCHES, WIDTH)
        pipe.step(x, target=y)
        first = dist.get_rank() == 0
        with pytest.raises(pe.InvalidSchedule if first else pe.PeerError) as refused:
            pipe.step(x, target=y)
        return str(refused.value)


def test_all_processes_are_told_that_the_limit_is_too_small():
    for said in run(2, exceed):
        assert f"one microbatch takes [{RESULT}, {LAST}] bytes, by stage" in said
        assert f"the rank would hold {LAST} of memory, its limit is {LAST - 1}" in said
