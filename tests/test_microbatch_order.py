"""The order in which unequal microbatches enter: never worse than given, and close to the best where that is
known."""

import contextlib
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_orders import costs_for
from test_unequal_microbatches import MODES, built, named

import pipeline_ext as pe
from pipeline_ext import _C
from pipeline_ext.plan import zero_bubble
from pipeline_ext.plan.zero_bubble import rank_of_stage


@settings(deadline=None)
@given(named, st.sampled_from(MODES), st.integers(1, 60), st.data())
def test_an_order_is_never_longer_than_the_given_one_and_simulates_as_told(schedule, mode, simulations, data):
    plan = built(schedule, **mode)
    costs = data.draw(costs_for(plan))
    found = pe.microbatch_order(plan, costs, simulations=simulations)
    assert sorted(found.order) == list(range(plan.num_microbatches))
    assert found.given == pe.simulate(plan, costs).makespan >= found.makespan
    assert pe.simulate(plan, costs.reordered(found.order)).makespan == found.makespan
    if found.makespan == found.given:
        assert found.order == list(range(plan.num_microbatches))
    assert pe.microbatch_order(plan, costs, simulations=simulations) == found


def unequal(count, seed):
    """Factors of 1 with some of 2 and 6, or drawn from a long tail."""
    r = random.Random(seed)
    if seed % 2:
        return [r.lognormvariate(0.0, 1.0) for _ in range(count)]
    return [r.choices([1.0, 2.0, 6.0], [7, 2, 1])[0] for _ in range(count)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "gpipe", "zbv"])
def test_few_microbatches_come_in_the_best_order(schedule, seed):
    plan = built((schedule, 3, 6))
    costs = pe.Costs(latency=0.1, microbatch=unequal(6, seed))
    found = pe.microbatch_order(plan, costs)
    makespans = [
        pe.simulate(plan, costs.reordered(order)).makespan for order in itertools.permutations(range(6))
    ]
    assert min(makespans) <= found.makespan <= 1.05 * min(makespans)
    everything = pe.microbatch_order(plan, costs, simulations=720)
    assert everything.makespan == pytest.approx(min(makespans))


def test_unequal_microbatches_gain_from_their_order():
    plan = built(("1f1b", 4, 32))
    gains = []
    for seed in range(6):
        found = pe.microbatch_order(plan, pe.Costs(microbatch=unequal(32, seed)))
        gains.append(found.given / found.makespan)
    assert min(gains) > 1.05


@pytest.mark.parametrize(
    "factors", [None, [2.0] * 8, [0.0] * 8, [[1.0] * 8, [3.0] * 8], [[[1.0, 2.0, 3.0, 4.0]] * 8] * 2]
)
def test_equal_microbatches_keep_the_given_order(factors):
    found = pe.microbatch_order(built(("1f1b", 2, 8)), pe.Costs(microbatch=factors))
    assert found.order == list(range(8)) and found.makespan == found.given


def test_equal_ones_among_unequal_keep_their_order():
    factors = [1.0, 6.0, 1.0, 6.0, 1.0, 2.0, 1.0, 2.0, 1.0, 1.0]
    order = pe.microbatch_order(built(("1f1b", 3, 10)), pe.Costs(microbatch=factors)).order
    assert order != list(range(10))
    for value in set(factors):
        alike = [m for m in order if factors[m] == value]
        assert alike == sorted(alike)


def test_an_order_that_makes_no_difference_is_not_chosen():
    plan = built(("gpipe", 1, 6))
    assert pe.microbatch_order(plan, pe.Costs(microbatch=[3, 1, 2, 6, 1, 5])).order == list(range(6))


def test_a_table_counts_at_each_stage():
    # The same work in all, but of other microbatches at each stage.
    plan = built(("1f1b", 2, 4))
    costs = pe.Costs(microbatch=[[1, 1, 1, 6], [6, 1, 1, 1]])
    found = pe.microbatch_order(plan, costs)
    best = min(pe.simulate(plan, costs.reordered(order)).makespan for order in itertools.permutations(range(4)))
    assert found.makespan == best < found.given


@pytest.mark.parametrize(
    "given, said",
    [
        ({"plan": "1f1b"}, "plan is '1f1b'; give a Plan"),
        ({"costs": 1}, "costs is 1; give a Costs"),
        ({"simulations": 0}, "simulations is 0; give a whole number of at least 1"),
        ({"seed": -1}, "seed is -1; give a whole number"),
    ],
)
def test_what_is_no_argument_is_refused(given, said):
    arguments = {"plan": built(("1f1b", 2, 2)), "costs": pe.Costs(microbatch=[1, 2])} | given
    with pytest.raises(pe.InvalidArgument, match=said):
        pe.microbatch_order(arguments.pop("plan"), arguments.pop("costs"), **arguments)


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], "012", 3, [0, None, 2]])
def test_an_order_lists_each_microbatch_once(order):
    with pytest.raises(
        pe.InvalidArgument, match="order is .*; give each of the 3 microbatches, from 0 to 2, once"
    ):
        pe.Costs(microbatch=[1, 2, 3]).reordered(order)


def small_case(r):
    """A placement and costs for which good orders come close to the bound: few tasks, few different times."""
    ranks, chunks, count = r.randint(1, 3), r.randint(1, 2), r.randint(1, 4)
    stages = ranks * chunks

    def some(length, *values):
        return [r.choice(values) for _ in range(length)]

    def row(*values):
        return some(count, *values)

    i, w = some(stages, 0, 1, 2), some(stages, 0, 1, 3)
    form = r.randrange(3)
    factors = row(0.25, 1, 4)
    if form > 0:
        factors = [row(0.25, 1, 4) for _ in range(stages)]
    if form > 1:
        factors = [[some(4, 0.25, 1, 4) for _ in of_stage] for of_stage in factors]
    costs = pe.Costs(
        forward=some(stages, 0, 1, 2),
        backward=[a + b for a, b in zip(i, w)],
        input_grad=i,
        weight_grad=w,
        latency=r.choice((0.0, 0.0, 1.0)),
        overhead=r.choice((0.0, 0.0, 0.5)),
        pair=r.choice((1.0, 1.0, 0.5)),
        mem_i=r.choice((0.0, 0.5)),
        memory_limit=r.choice((None, chunks, chunks + 1)),
        microbatch=factors,
    )
    return costs, stages, ranks, count


def test_no_order_of_tasks_or_microbatches_beats_the_bound():
    close = 0
    for seed in range(600):
        costs, stages, ranks, count = small_case(random.Random(seed))
        home = rank_of_stage(stages, ranks)
        by_stage = costs.by_stage(stages, ranks)
        least, least_span = _C.lower_bound(home, ranks, count, by_stage)
        for is_span, bound in ((False, least), (True, least_span)):
            with contextlib.suppress(pe.InvalidSchedule):  # found none within the memory limit
                _, found, *_ = _C.search_zero_bubble(
                    home, ranks, count, by_stage, span=is_span, templates=[], work=500, seconds=math.inf,
                    seed=seed, threads=1,
                )  # fmt: skip
                assert found >= bound * (1 - 1e-9), seed
                close += found <= bound * (1 + 1e-9)
        for name in ("gpipe", "1f1b", "zb-h1", "zbv", "dualpipev"):
            if _C.layout_of(name) != zero_bubble.layout(stages, ranks):
                continue
            plan = pe.build_plan(name, num_stages=stages, num_ranks=ranks, microbatches=count)
            with contextlib.suppress(pe.InvalidSchedule):  # exceeds the memory limit
                assert pe.microbatch_order(plan, costs).makespan >= least * (1 - 1e-9), (seed, name)
    assert close > 300  # of 1200: the bound is often reached
