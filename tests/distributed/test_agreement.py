"""Processes that were given different pipelines are told so as these are made, and of what differs."""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch import nn

import pipeline_ext as pe


def stages(width=4):
    return [nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4)]


def layer(forward):
    """A module of a class whose name is always the same."""
    return type("Layer", (nn.Module,), {"forward": forward, "__module__": "layers"})()


# By what the error names: what process 0 and what process 1 is given.
CASES = {
    "schedule is gpipe in process 1 and 1f1b in process 0": [
        {"schedule": "1f1b"},
        {"schedule": "gpipe"},
    ],
    "microbatches is 2 in process 1 and 4 in process 0": [{"microbatches": 4}, {"microbatches": 2}],
    "num_stages is 2 in process 1 and 3 in process 0": [
        {"schedule": [["0F0", "2F0", "2B0", "0B0"], ["1F0", "1B0"]], "microbatches": 1},
        {"schedule": "1f1b", "microbatches": 1, "num_stages": 2},
    ],
    "stage 0 is 0.weight: float32[5, 4] in process 1 and 0.weight: float32[4, 4] in process 0": [
        {"model": lambda: nn.Sequential(*stages())},
        {"model": lambda: nn.Sequential(*stages(width=5))},
    ],
    "float64": [
        {"model": lambda: nn.Sequential(*stages())},
        {"model": lambda: nn.Sequential(*stages()).double()},
    ],
    "layers.Layer": [
        {"model": lambda: nn.Sequential(nn.Linear(4, 4), layer(lambda self, x: x + 1))},
        {"model": lambda: nn.Sequential(nn.Linear(4, 4), layer(lambda self, x: x - 1))},
    ],
    "layers.Layer ": [
        {"model": lambda: nn.Sequential(nn.Linear(4, 4), layer(lambda self, x: x * 2.5))},
        {"model": lambda: nn.Sequential(nn.Linear(4, 4), layer(lambda self, x: x * 3.5))},
    ],
    "wire is torch.bfloat16 in process 1 and None in process 0": [{}, {"wire": torch.bfloat16}],
    "wire_forward is torch.float16 in process 1 and None in process 0": [
        {},
        {"wire_forward": torch.float16},
    ],
    "loss_reduction is sum in process 1 and mean in process 0": [{}, {"loss_reduction": "sum"}],
    "pack is": [{}, {"pack": 2}],
}


def make(model=lambda: nn.Sequential(*stages()), num_stages=2, microbatches=4, schedule="1f1b", **options):
    if isinstance(schedule, list):
        num_stages = 3
    return pe.Pipeline(
        model(), num_stages, microbatches, schedule, F.mse_loss, mesh=dist.group.WORLD, **options
    )


def disagree():
    """What each case raises, and whether processes that agree after all of them can train."""
    errors = []
    for case in CASES.values():
        try:
            make(**case[dist.get_rank()])
        except pe.PipelineError as error:
            errors.append((type(error), str(error)))
        else:
            errors.append((None, "agreed"))
    with contextlib.closing(make()) as pipe:
        return errors, pipe.step(torch.randn(8, 4), target=torch.randn(8, 4)).item()


def test_every_process_is_told_what_differs():
    (errors, loss), (others, same_loss) = run(2, disagree)
    for (kind, text), other, expected in zip(errors, others, CASES):
        assert kind is pe.InvalidArgument, (expected, text)
        assert expected.strip() in text and "the processes of the mesh were given different pipelines" in text
        assert "process 0" in text and "process 1" in text and len(text) < 400, text
        assert other == (kind, text)
    assert loss == same_loss


def stay_away():
    if dist.get_rank() == 1:
        return None
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    try:
        make(lambda: model, num_stages=3, timeout=1)
    except pe.PeerError as error:
        return str(error)


def test_a_process_that_makes_no_pipeline_is_named_once_the_time_is_over():
    text, _, other = run(3, stay_away)
    assert "no pipeline was made in process 1 within 1 seconds" in text == other
