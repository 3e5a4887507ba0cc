"""Skips of stages that are given as functions: no process sees all of their modules."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from random_runs import WIDTH, Dawdling
from reference import reference_step, twin
from torch import nn

import pipeline_ext as pe

ENDS = [(["far", "same"], []), (["near"], []), ([], ["near"]), ([], ["far", "same"])]  # by stage


def pipeline(layers, schedule, **options):
    functions = [functools.partial(twin, layer) for layer in layers]
    return pe.Pipeline(functions, None, 4, schedule, F.mse_loss, mesh=dist.group.WORLD, timeout=20, **options)


def train():
    plain = nn.Sequential(*(Dawdling(None, *ends) for ends in ENDS))
    planned = []
    for schedule in ("interleaved-1f1b", "zbv"):
        plain.zero_grad()
        with pipeline(plain, schedule, pack_skips={"far": 2}) as pipe:
            for rows in (8, 7):
                x, y = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)
                pipe.step(x, target=y)
                reference_step(plain, x, y, 4, F.mse_loss)
            for name, p in pipe.named_parameters():
                assert torch.equal(p.grad, plain.get_parameter(name).grad), (schedule, name)
            planned.append([(s.source, s.target, s.pack, s.pack_forward) for s in pipe.plan.skips])
    return planned


def test_every_process_plans_all_of_them():
    for planned in run(2, train):
        assert planned == [[(0, 3, 2, 2), (0, 3, 1, 1), (1, 2, 1, 1)]] * 2


def refuse():
    layers = [Dawdling(None, [], ["never"] if stage == 2 else []) for stage in range(4)]
    with pytest.raises(pe.InvalidArgument, match="stage 2 pops 'never', which no module stashes"):
        pipeline(layers, "interleaved-1f1b")


def test_every_process_refuses_ends_that_do_not_match():
    run(2, refuse)
