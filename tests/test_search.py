"""The search for the best plan: what it says about what it found."""

import pipeline_ext as pe
from pipeline_ext.search import search


def test_no_plan_of_any_placement_tried_is_below_the_bound():
    # Of two stages a rank, in a V, the dear ones are both on one rank; in turn each rank has one.
    costs = pe.Costs(forward=[1.0, 5.0, 5.0, 1.0])
    found = search(costs, num_ranks=2, microbatches=8, chunks=(2,), trials=1)
    assert all(tried.makespan >= found.lower_bound for tried in found.tried if tried.makespan is not None)
    assert any(tried.what == "interleaved-1f1b" for tried in found.tried)
