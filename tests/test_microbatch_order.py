"""The order in which unequal microbatches enter: never worse than given, and close to the best where that is
known."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_orders import costs_for
from test_unequal_microbatches import MODES, built, named

import pipeline_ext as pe


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


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [1, 2, 3], "012"])
def test_an_order_lists_each_microbatch_once(order):
    with pytest.raises(
        pe.InvalidArgument, match="order is .*; give each of the 3 microbatches, from 0 to 2, once"
    ):
        pe.Costs(microbatch=[1, 2, 3]).reordered(order)
