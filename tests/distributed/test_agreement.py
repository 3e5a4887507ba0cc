"""Processes that were given different pipelines are told so as these are made, and of what differs."""

import contextlib

import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch import nn

import pipeline_ext as pe

THREE_ON_TWO = [  # stage 2 returns to the first rank
    [f"{action}{m}" for m in range(4) for action in ("0F", "2F", "2B", "0B")],
    [f"{action}{m}" for m in range(4) for action in ("1F", "1B")],
]


def stages(width=4):
    return [nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4)]


def layer(forward):
    """A module of a class whose name is always the same."""
    return type("Layer", (nn.Module,), {"forward": forward, "__module__": "layers"})()


def chain(*added, width=4):
    return lambda: nn.Sequential(*stages(width), *added)


DEFAULT = chain()

# What the error names, what process 0 is given, and what process 1.
CASES = [
    ("schedule is gpipe in process 1 and 1f1b in process 0", {}, {"schedule": "gpipe"}),
    ("microbatches is 2 in process 1 and 4 in process 0", {}, {"microbatches": 2}),
    ("num_stages is 3 in process 1 and 2 in process 0", {}, {"num_stages": 3, "schedule": THREE_ON_TWO}),
    ("0.weight: float32[5, 4] in process 1", {"model": chain()}, {"model": chain(width=5)}),
    ("weight: float64[4, 4] in process 1", {"model": chain()}, {"model": lambda: chain()().double()}),
    ("layers.Layer", {"model": chain(layer(lambda m, x: x + 1))}, {"model": chain(layer(lambda m, x: x - 1))}),
    ("layers.Layer", {"model": chain(layer(lambda m, x: x * 2))}, {"model": chain(layer(lambda m, x: x * 3))}),
    (
        "layers.Layer",
        {"model": chain(pe.skips()(type(layer(lambda m, x: x * 2)))())},
        {"model": chain(pe.skips()(type(layer(lambda m, x: x * 3)))())},
    ),
    ("wire is torch.bfloat16 in process 1 and None in process 0", {}, {"wire": torch.bfloat16}),
    ("wire_forward is torch.float16 in process 1", {}, {"wire_forward": torch.float16}),
    ("loss_reduction is sum in process 1 and mean in process 0", {}, {"loss_reduction": "sum"}),
    ("pack is 2 in process 1 and 1 in process 0", {}, {"pack": 2}),
    ("pack is auto in process 1 and 1 in process 0", {}, {"pack": "auto"}),
    ("costs is Costs(forward=1.0", {}, {"costs": pe.Costs(memory_limit=9)}),
]


def make(model=DEFAULT, num_stages=2, microbatches=4, schedule="1f1b", **options):
    return pe.Pipeline(
        model(), num_stages, microbatches, schedule, F.mse_loss, mesh=dist.group.WORLD, **options
    )


def disagree():
    """What each case raises, and whether processes that agree after all of them can train."""
    errors = []
    for _, *given in CASES:
        try:
            make(**given[dist.get_rank()])
        except pe.PipelineError as error:
            errors.append((type(error), str(error)))
        else:
            errors.append((None, "agreed"))
    with contextlib.closing(make()) as pipe:
        return errors, pipe.step(torch.randn(8, 4), target=torch.randn(8, 4)).item()


def test_every_process_is_told_what_differs():
    (errors, loss), (others, same_loss) = run(2, disagree)
    for (kind, text), other, (expected, *_) in zip(errors, others, CASES, strict=True):
        assert kind is pe.InvalidArgument, (expected, text)
        assert expected in text and "the processes of the mesh were given different pipelines" in text
        assert "process 0" in text and "process 1" in text and len(text) < 400, text
        assert other == (kind, text)
    assert loss == same_loss


def stay_away():
    dist.barrier()  # all are connected before one ends
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
