"""Reaction pays: where the times of tasks vary, a rank that reacts loses less than one that keeps its order."""

import statistics

import pytest

import pipeline_ext as pe


def means(schedule, ranks, microbatches, seeds):
    """Mean makespan, static and reactive, of the same random times."""
    chunks = 2 if schedule in ("interleaved-1f1b", "zbv") else 1
    size = {"num_stages": ranks * chunks, "num_ranks": ranks, "microbatches": microbatches}
    plans = [pe.build_plan(schedule, **size, reactive=reactive) for reactive in (False, True)]
    return [
        statistics.mean(pe.simulate(plan, noise=0.3, seed=seed).makespan for seed in range(seeds))
        for plan in plans
    ]


@pytest.mark.parametrize("ranks", [4, 8, 32])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "zb-h2", "zbv"])
def test_reactive_ranks_take_less_time_on_average_where_times_vary(schedule, ranks):
    static, reactive = means(schedule, ranks, microbatches=2 * ranks, seeds=20)
    assert reactive < static


def test_noise_is_of_the_action_whatever_the_mode():
    size = {"num_stages": 1, "microbatches": 5}
    makespans = {
        pe.simulate(pe.build_plan("gpipe", **size, **mode), noise=0.3, seed=3).makespan
        for mode in ({}, {"reactive": True})
    }
    assert len(makespans) == 1
    assert makespans != {pe.simulate(pe.build_plan("gpipe", **size), noise=0.3, seed=4).makespan}


@pytest.mark.parametrize("noise", [-0.1, float("nan")])
def test_a_noise_that_cannot_be_is_refused(noise):
    with pytest.raises(pe.InvalidSchedule, match="coefficient of variation"):
        pe.simulate(pe.build_plan("gpipe", num_stages=2, microbatches=2), noise=noise)


@pytest.mark.parametrize("seed", [-1, 0.5, "a"])
def test_a_seed_that_cannot_be_is_refused(seed):
    with pytest.raises(pe.InvalidArgument, match="seed"):
        pe.simulate(pe.build_plan("gpipe", num_stages=2, microbatches=2), seed=seed)
