"""The search for the best plan: what it says about what it found."""

import pytest

import pipeline_ext as pe
from pipeline_ext.search import search


def test_no_plan_of_any_placement_tried_is_below_the_bound():
    # Of two stages a rank, in a V, the dear ones are both on one rank; in turn each rank has one.
    costs = pe.Costs(forward=[1.0, 5.0, 5.0, 1.0])
    found = search(costs, num_ranks=2, microbatches=8, chunks=(2,), trials=1)
    assert all(tried.makespan >= found.lower_bound for tried in found.tried if tried.makespan is not None)
    assert any(tried.what == "interleaved-1f1b" for tried in found.tried)


def test_a_spent_budget_leaves_named_schedules_untried():
    found = search(pe.Costs(latency=0.5), num_ranks=4, microbatches=8, budget=1e-9)
    assert [tried.what for tried in found.tried] == ["gpipe"]
    assert found.best.schedule == "gpipe"


def test_orders_are_not_searched_for_more_stages_than_can_be_told_apart():
    with pytest.raises(pe.InvalidSchedule, match="at most 32767 stages, got 32768"):
        pe.build_plan("zb-auto", num_stages=2**15, microbatches=1)
