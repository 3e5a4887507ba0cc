"""Simulated and executed orders against published ones."""

import pytest
import textbook
import torch
from torch import nn

import pipeline_ext as pe


def simple(name, stages, microbatches):
    generate = {"gpipe": textbook.gpipe, "1f1b": textbook.one_f_one_b}[name]
    return {s: generate(s, stages, microbatches) for s in range(stages)}


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", range(2, 9))
def test_simulated_order_is_the_textbook_order(name, stages):
    for microbatches in range(1, 17):
        plan = pe.build_plan(name, num_stages=stages, microbatches=microbatches)
        expected = simple(name, stages, microbatches)
        assert plan.order() == expected
        assert pe.simulate(plan).order() == expected


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", range(2, 9))
def test_a_reactive_rank_keeps_the_textbook_order_while_all_stages_cost_the_same(name, stages):
    for microbatches in range(1, 17):
        plan = pe.build_plan(name, num_stages=stages, microbatches=microbatches, reactive=True)
        assert pe.simulate(plan).order() == simple(name, stages, microbatches)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_interleaved_order_is_the_published_order(ranks, chunks):
    for groups in (1, 2, 3, 5):
        plan = pe.build_plan(
            "interleaved-1f1b",
            num_stages=ranks * chunks,
            num_ranks=ranks,
            microbatches=groups * ranks,
        )
        expected = {r: textbook.interleaved(r, ranks, chunks, groups * ranks) for r in range(ranks)}
        assert plan.order() == expected
        assert pe.simulate(plan).order() == expected


@pytest.mark.parametrize("ranks", range(1, 9))
def test_interleaved_takes_any_number_of_microbatches(ranks):
    for chunks in range(1, 5):
        for microbatches in range(1, 30):
            plan = pe.build_plan(
                "interleaved-1f1b",
                num_stages=ranks * chunks,
                num_ranks=ranks,
                microbatches=microbatches,
            )
            assert len(plan) == 2 * ranks * chunks * microbatches


def test_interleaved_agrees_with_torch_where_the_groups_are_uneven_but_equal():
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

    class Shape(schedules.ScheduleInterleaved1F1B):
        def __init__(self, rank, ranks, chunks, microbatches):
            self.rank, self.pp_group_size, self.n_local_stages = rank, ranks, chunks
            self._n_microbatches = microbatches
            self.number_of_rounds = max(1, microbatches // ranks)
            self.microbatches_per_round = microbatches // self.number_of_rounds

    for ranks, chunks, microbatches in [(4, 2, 10), (4, 3, 3), (3, 2, 8), (2, 2, 6), (4, 2, 8)]:
        plan = pe.build_plan(
            "interleaved-1f1b",
            num_stages=ranks * chunks,
            num_ranks=ranks,
            microbatches=microbatches,
        )
        for rank in range(ranks):
            shape = Shape(rank, ranks, chunks, microbatches)
            theirs = shape._calculate_single_rank_operations(rank)
            assert plan.order()[rank] == [str(a) for a in theirs if a is not None]


def identity_stages(count):
    return [nn.Linear(2, 2) for _ in range(count)]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize("stages", range(2, 9))
def test_executed_order_is_the_textbook_order_when_told_to_be_static(name, stages):
    for microbatches in range(1, 17):
        with pe.Pipeline(
            identity_stages(stages),
            microbatches=microbatches,
            schedule=name,
            loss_fn=lambda out: out.sum(),
            reactive=False,
        ) as pipe:
            pipe.step(torch.randn(microbatches, 2))
            assert pipe.trace.order() == simple(name, stages, microbatches)


@pytest.mark.parametrize("stages, ranks, microbatches", [(4, 2, 4), (6, 3, 9), (6, 2, 4), (8, 4, 8)])
def test_executed_interleaved_order_is_the_published_order(stages, ranks, microbatches):
    with pe.Pipeline(
        identity_stages(stages),
        microbatches=microbatches,
        schedule="interleaved-1f1b",
        devices=["cpu"] * ranks,
        loss_fn=lambda out: out.sum(),
        reactive=False,
    ) as pipe:
        pipe.step(torch.randn(microbatches, 2))
        assert pipe.trace.order() == {
            r: textbook.interleaved(r, ranks, stages // ranks, microbatches) for r in range(ranks)
        }


def test_a_given_order_runs_as_given():
    order = {0: ["0F1", "0F0", "0B1", "0B0"], 1: ["1F1", "1B1", "1F0", "1B0"]}
    with pe.Pipeline(
        identity_stages(2),
        microbatches=2,
        schedule=order,
        loss_fn=lambda out: out.sum(),
        reactive=False,
    ) as pipe:
        pipe.step(torch.randn(2, 2))
        assert pipe.trace.order() == order
