"""A process dies or stands still outside of a step: the others name it within the timeout."""

import re
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Gone, die, freeze, outcomes
from torch import nn

import pipeline_ext as pe

LIMIT = 4.0  # seconds, the pipeline's timeout
SLACK = 8.0  # beside other tests; 2 on a quiet machine


def pipeline(stages=None):
    stages = stages or [nn.Linear(4, 4) for _ in range(dist.get_world_size())]
    return pe.Pipeline(stages, None, 4, "1f1b", F.mse_loss, mesh=dist.group.WORLD, timeout=LIMIT)


def evaluate(pipe, folder):
    pipe.eval(torch.randn(8, 4))


def save(pipe, folder):
    pe.save_checkpoint(f"{folder}/checkpoint", pipe, step=1)


def load(pipe, folder):
    pe.load_checkpoint(f"{folder}/before", pipe)


def clip(pipe, folder):
    pipe.clip_grad_norm_(1.0)


def trace(pipe, folder):
    pipe.gather_trace()


CALLS = [evaluate, save, load, clip, trace]


def between(victim, fault, call, folder):
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    backend.options._timeout = type(backend.options._timeout)(seconds=LIMIT)
    pipe = pipeline()
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    for _ in range(2):
        pipe.step(x, target=y)
    pe.save_checkpoint(f"{folder}/before", pipe, step=0)
    if dist.get_rank() == victim:
        time.sleep(0.5)  # what it has begun to send leaves
        fault()
    began = time.monotonic()
    try:
        call(pipe, folder)
    except pe.PipelineError as error:
        failure = f"{type(error).__name__}: {error}"
    else:
        failure = None  # all had come when it died
    return failure, time.monotonic() - began


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", [die, freeze])
@pytest.mark.parametrize("size, victim", [(2, 0), (2, 1), (3, 1)])
def test_a_process_that_dies_or_stops_between_steps_is_named(size, victim, fault, call, tmp_path):
    found = outcomes(size, between, victim, fault, call, str(tmp_path), timeout=50)
    assert isinstance(found.pop(victim), Gone)
    for outcome in found:
        assert isinstance(outcome, tuple), outcome
        failure, seconds = outcome
        assert failure is not None
        assert re.search(rf"process {victim}\b", failure), failure
        assert seconds < (LIMIT if fault is freeze else 2.0) + SLACK, (seconds, failure)


def construct(victim, fault):
    if dist.get_rank() == victim:
        fault()
    began = time.monotonic()
    with pytest.raises(pe.PeerError) as failed:
        pipeline()
    return str(failed.value), time.monotonic() - began


@pytest.mark.parametrize("fault", [die, freeze])
def test_a_process_that_makes_no_pipeline_because_of_a_fault_is_named(fault):
    found = outcomes(3, construct, 1, fault, timeout=50)
    assert isinstance(found.pop(1), Gone)
    for text, seconds in found:
        assert "process 1" in text and seconds < LIMIT + SLACK
