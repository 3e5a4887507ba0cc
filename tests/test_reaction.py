"""Reaction pays: where the times of tasks vary, a rank that reacts loses less than one that keeps its order."""

import math
import random
import statistics

import pytest

import pipeline_ext as pe
from pipeline_ext import _C

EVERY_SIZE = [(ranks, times) for ranks in (2, 4, 8, 32) for times in (1, 2, 4, 8)]


@pytest.mark.parametrize(
    "ranks, times",
    [size if max(size) <= 4 else pytest.param(*size, marks=pytest.mark.every) for size in EVERY_SIZE],
)
@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_reactive_ranks_are_never_slower_in_expectation(ranks, times, processes):
    """For every schedule; times independent, or equal in all microbatches of a stage."""
    rows = []
    for schedule in filter(lambda name: _C.layout_of(name) != "bidirectional", _C.schedule_names()):
        chunks = {"looped": 2, "v": 2}.get(_C.layout_of(schedule), 1)
        size = {"num_stages": ranks * chunks, "num_ranks": ranks, "microbatches": times * ranks}
        plans = [pe.build_plan(schedule, **size, reactive=reactive) for reactive in (False, True)]
        for noise in (0.0, 0.1, 0.3, 1.0):
            for of_stages in (0.0, 0.3):
                pairs = []
                for seed in range(16 if noise or of_stages else 1):
                    costs = random_costs(size["num_stages"], of_stages, seed)
                    pairs.append(
                        [
                            pe.simulate(plan, costs, noise=noise, seed=seed, processes=processes).makespan
                            for plan in plans
                        ]
                    )
                static = statistics.mean(planned for planned, _ in pairs)
                gains = [(ours - planned) / static for planned, ours in pairs]
                error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
                rows.append((statistics.mean(gains), error, schedule, noise, of_stages))
    # Of so many rows a few lie beyond two standard errors by chance.
    assert [row for row in rows if row[0] > 3 * row[1] + 0.002] == []
    assert sum(row[0] > 2 * row[1] + 0.0005 for row in rows) <= 0.05 * len(rows)


def random_costs(num_stages, variation, seed):
    """Stages whose times vary, in all microbatches alike."""
    chance = random.Random(seed)
    factors = [math.exp(chance.gauss(0, variation)) for _ in range(num_stages)]
    return pe.Costs(forward=factors, backward=[2 * factor for factor in factors])


def means(schedule, ranks, slots=1, seeds=20):
    """Mean makespan of the same random times: static, and reactive with ``slots`` times the slots it plans."""
    chunks = {"looped": 2, "v": 2}.get(_C.layout_of(schedule), 1)
    size = {"num_stages": ranks * chunks, "num_ranks": ranks, "microbatches": 4 * ranks}
    costs = pe.Costs(forward=1 / chunks, backward=2 / chunks)
    static = pe.build_plan(schedule, **size)
    room = [min(slots * limit, 4 * ranks) for limit in static.limits] if slots > 1 else ()
    reactive = pe.build_plan(schedule, **size, reactive=True, room=room)
    return [
        statistics.mean(pe.simulate(plan, costs, noise=0.3, seed=seed).makespan for seed in range(seeds))
        for plan in (static, reactive)
    ]


@pytest.mark.parametrize("ranks", [4, 8, 32])
@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "zb-h1", "zb-h2", "zbv", "v-half"])
def test_reactive_ranks_take_less_time_on_average_where_times_vary(schedule, ranks):
    static, reactive = means(schedule, ranks)
    assert reactive < static


@pytest.mark.parametrize("ranks", [4, 8, 32])
def test_reactive_ranks_of_1f1b_take_less_time_where_they_have_free_slots(ranks):
    # With the slots it plans it has nothing else to do: all are taken, and it has no W.
    static, reactive = means("1f1b", ranks, slots=2)
    assert reactive < 0.97 * static


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
    with pytest.raises(pe.InvalidArgument, match="noise is (-0.1|nan); give a number from 0 to 1000"):
        pe.simulate(pe.build_plan("gpipe", num_stages=2, microbatches=2), noise=noise)


@pytest.mark.parametrize("seed", [-1, 0.5, "a"])
def test_a_seed_that_cannot_be_is_refused(seed):
    with pytest.raises(pe.InvalidArgument, match="seed"):
        pe.simulate(pe.build_plan("gpipe", num_stages=2, microbatches=2), seed=seed)
