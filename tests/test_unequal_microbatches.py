"""Costs by microbatch: what is simulated, bounded, searched for, cut anew, and refused."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_orders import NAMED, costs_for, orders

import pipeline_ext as pe
from pipeline_ext import _C
from pipeline_ext.plan.comparison import planned, simulated
from pipeline_ext.plan.costs import rebatched, recut
from pipeline_ext.plan.microbatch_factors import KINDS
from pipeline_ext.plan.search import search
from pipeline_ext.report.timeline import unit_of

CLOSE = 1e-9
MODES = [{}, {"overlap": True}, {"reactive": True}, {"overlap": True, "reactive": True}]
named = st.tuples(st.sampled_from(NAMED), st.integers(1, 4), st.integers(1, 8))


def built(schedule, **mode):
    if isinstance(schedule, tuple):
        name, ranks, microbatches = schedule
        chunks = {"looped": 3, "v": 2}.get(_C.layout_of(name), 1)
        return pe.build_plan(
            name, num_stages=ranks * chunks, num_ranks=ranks, microbatches=microbatches, **mode
        )
    return _C.plan_of_cells(schedule, **mode)


def factor(costs, stage, kind, microbatch):
    """Written down independently of the package."""
    factors = costs.microbatch
    if factors is None:
        return 1.0
    if not isinstance(factors[0], list):
        return factors[microbatch]
    found = factors[stage][microbatch]
    return found["FBIW".index(kind)] if isinstance(found, list) else found


def time_of(costs, stage, kind, microbatch):
    by_kind = {"F": costs.forward, "B": costs.backward, "I": costs.input_grad, "W": costs.weight_grad}
    return by_kind[kind][stage] * factor(costs, stage, kind, microbatch)


@settings(deadline=None)
@given(st.one_of(named, orders(pairs=False)), st.sampled_from(MODES), st.data())
def test_a_task_takes_its_stages_time_times_its_factor(schedule, mode, data):
    plan = built(schedule, **mode)
    costs = data.draw(costs_for(plan, contention=False))
    simulation = pe.simulate(plan, costs)
    busy = [0.0] * plan.num_ranks
    for t, (begin, end) in enumerate(zip(simulation.begin, simulation.end)):
        kind, stage, microbatch, rank, _ = plan.describe(t)
        sending = plan.num_messages_of(t) and costs.overhead[stage if kind == "F" else stage - 1]
        if any("OVERLAP" in cell for cell in plan.order()[rank]):
            return
        assert end - begin == pytest.approx(time_of(costs, stage, kind, microbatch) + sending, abs=CLOSE)
        busy[rank] += time_of(costs, stage, kind, microbatch)
    if "overlap" not in mode:
        assert simulated("", plan, costs).ideal == pytest.approx(max(busy), abs=CLOSE)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipe", "interleaved-1f1b"])
def test_factors_of_one_change_nothing_and_all_forms_agree(schedule, mode):
    plan = built((schedule, 4, 6), **mode)
    stages = plan.num_stages
    costs = {"forward": [1 + 0.1 * s for s in range(stages)], "latency": 0.25, "overhead": 0.125}

    def begins(factors):
        return pe.simulate(plan, pe.Costs(**costs, microbatch=factors)).begin

    assert begins(None) == begins([1.0] * 6) == begins([[[1.0] * 4] * 6] * stages)
    factors = [1, 0.5, 3, 1, 1, 2]
    assert begins(factors) != begins(None)
    assert begins(factors) == begins([factors] * stages) == begins([[[f] * 4 for f in factors]] * stages)


@settings(deadline=None)
@given(st.one_of(named, orders()), st.data())
def test_no_step_that_keeps_its_memory_is_shorter_than_the_bound(schedule, data):
    if isinstance(schedule, tuple) and schedule[0] == "dualpipe":
        return
    plan = built(schedule, reactive=data.draw(st.booleans()))
    costs = data.draw(costs_for(plan))
    needed = pe.simulate(built(schedule), costs).peak_memory
    limited = pe.Costs(**{**vars(costs), "memory_limit": needed})
    simulation = pe.simulate(plan, limited)
    by_stage = limited.by_stage(plan.num_stages, plan.num_ranks)
    makespan, span = _C.lower_bound(plan.rank_of_stage, plan.num_ranks, plan.num_microbatches, by_stage)
    assert simulation.makespan >= makespan - CLOSE
    spans = [end - begin for begin, end in zip(simulation.first_start, simulation.finish)]
    assert max(spans) >= span - CLOSE


def test_the_bound_knows_the_factors():
    def bound(stages, microbatches, factors):
        costs = pe.Costs(microbatch=factors).by_stage(stages, stages)
        return _C.lower_bound(list(range(stages)), stages, microbatches, costs)[0]

    assert bound(1, 3, [1, 2, 6]) == 3 * 9
    # The longest microbatch is alone on its way there and back, with its `W` at the end.
    assert bound(4, 8, [0.1] * 7 + [10.0]) == 10 * (4 * 2 + 1)
    # The work at stage 2, and the way to it.
    assert bound(4, 8, [[1.0] * 8, [1.0] * 8, [5.0] * 7 + [1.0], [1.0] * 8]) == 3 * 36 + 2


def test_without_factors_the_bound_is_what_it_was():
    costs = pe.Costs(forward=[1.0, 2.0, 1.5], backward=[2.0, 5.0, 2.5], input_grad=1.0, latency=0.5, pair=0.9)
    ones = pe.Costs(**{**vars(costs), "microbatch": [1.0] * 5})
    ours, theirs = (_C.lower_bound([0, 1, 2], 3, 5, c.by_stage(3, 3)) for c in (costs, ones))
    assert ours == pytest.approx(theirs)


# -- searches


def test_a_search_finds_an_order_for_the_factors_given():
    factors = [6.0, 1, 1, 1, 1, 1, 1, 6.0]
    costs = pe.Costs(microbatch=factors)
    found = search(costs, num_ranks=3, microbatches=8, chunks=(1, 2), trials=200)
    plain = search(pe.Costs(), num_ranks=3, microbatches=8, chunks=(1, 2), trials=200)
    theirs = recut(costs, 3, plain.best.plan.num_stages)
    assert found.lower_bound <= found.best.simulation.makespan <= pe.simulate(plain.best.plan, theirs).makespan
    assert search(pe.Costs(microbatch=[1.0] * 8), num_ranks=3, microbatches=8, trials=50).best.plan.order() == (
        search(pe.Costs(), num_ranks=3, microbatches=8, trials=50).best.plan.order()
    )


def test_a_schedule_by_name_is_compared_at_the_factors():
    costs = pe.Costs(backward=2.0, microbatch=[1, 4, 1, 1])
    found = planned("zb-h1", num_stages=4, num_ranks=4, microbatches=4, costs=costs)
    assert found.ideal == 3 * 7
    assert found.simulation.makespan >= found.lower_bound >= 3 * 7
    assert (
        found.simulation.makespan
        > planned("zb-h1", num_stages=4, num_ranks=4, microbatches=4, costs=pe.Costs()).simulation.makespan
    )


# -- cut anew


@st.composite
def cut_costs(draw):
    stages, microbatches = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    plan = built(("gpipe", stages, microbatches))
    return draw(costs_for(plan)), stages, microbatches


@given(cut_costs(), st.integers(1, 7))
def test_a_model_cut_anew_does_the_same_work_for_each_microbatch(cut, wanted):
    costs, stages, microbatches = cut
    once = pe.Costs(**{**vars(costs), "latency": 0.0, "overhead": 0.0, "bandwidth": 1.0, "message_bytes": 0.0})
    again = recut(once, stages, wanted)
    for kind in KINDS:
        for m in range(microbatches):
            had = [time_of(once, s, kind, m) for s in range(stages)]
            has = [time_of(again, s, kind, m) for s in range(wanted)]
            assert sum(has) == pytest.approx(sum(had), abs=CLOSE)
            if wanted % stages == 0:
                assert has[0] == pytest.approx(had[0] * stages / wanted, abs=CLOSE)


@given(cut_costs(), st.integers(1, 12))
def test_a_batch_cut_anew_is_the_same_work_at_each_stage(cut, wanted):
    costs, stages, microbatches = cut
    again = rebatched(costs, microbatches / wanted)
    for kind in KINDS:
        for s in range(stages):
            had = sum(time_of(costs, s, kind, m) for m in range(microbatches))
            has = sum(time_of(again, s, kind, m) for m in range(wanted))
            assert has == pytest.approx(had, abs=CLOSE)


def test_a_search_over_numbers_of_microbatches_does_equal_work():
    costs = pe.Costs(microbatch=[1.0, 3.0, 1.0, 1.0])
    found = search(costs, num_ranks=2, microbatches=[4, 8, 2], chunks=(1, 2), trials=30)
    for tried in found.tried:
        assert tried.makespan >= 3 * 6


# -- forms and refusals


@pytest.mark.parametrize(
    "given, said",
    [
        ("fast", "microbatch is 'fast'; give one factor for each microbatch, or a list of such lists"),
        (2.0, "microbatch is 2.0; give one factor for each microbatch"),
        ([], "microbatch has lists of length 0"),
        ([[]], "microbatch has lists of length 0"),
        ([1.0, [2.0]], r"microbatch is \[1.0, \[2.0\]\]; give one factor"),
        ([[1.0], [2.0, 3.0]], "microbatch has lists of length 1, 2"),
        (
            [[[1.0, 1.0, 1.0]]],
            "microbatch has lists of length 3; .* or four, for F, B, I and W, for each microbatch",
        ),
        ([[[[1.0] * 4] * 4]], r"microbatch is \[\[\[\[1.0, .*; give one factor"),
        ([1.0, -1.0], "microbatch holds -1.0; a factor is a finite number of at least 0"),
        ([1.0, math.nan], "microbatch holds nan; a factor"),
        ([1.0, math.inf], "microbatch holds inf; a factor"),
        ([1.0, 10**400], "microbatch holds .*; a factor"),
        ([1.0, "2"], "microbatch holds '2'; a factor"),
        ([1.0, True], "microbatch holds True; a factor"),
        ({"F": [1.0]}, "microbatch is {'F'"),
    ],
)
def test_what_is_no_factor_is_refused_when_it_is_given(given, said, tmp_path):
    with pytest.raises(pe.InvalidArgument, match=said) as refused:
        pe.Costs(microbatch=given)
    assert len(str(refused.value)) < 400
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"microbatch": given}))
    with pytest.raises(pe.InvalidArgument, match=r"^'microbatch' in '.*costs.json' (is|has|holds) "):
        pe.Costs.load(file)


def test_a_picture_and_a_pipeline_know_the_factors(tmp_path):
    costs = pe.Costs(microbatch=[1.0, 4.0, 1.0])
    plan = built(("1f1b", 2, 3))
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pe.Pipeline(layers, 2, 3, "1f1b", torch.nn.functional.mse_loss, reactive=False, costs=costs) as pipe:
        assert pipe.simulate(costs).makespan == pe.simulate(plan, costs).makespan > pe.simulate(plan).makespan
    assert unit_of(pe.Costs()) == "F = 1" and unit_of(costs) == "unit of the costs"
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    plan.draw(tmp_path / "plan.svg", costs)
    assert "unit of the costs" in (tmp_path / "plan.svg").read_text()


def test_arrays_are_factors_too():
    numpy = pytest.importorskip("numpy")
    costs = pe.Costs(microbatch=numpy.array([[1, 2], [3, 4]]))
    assert costs.microbatch == [[1.0, 2.0], [3.0, 4.0]]
    assert pe.Costs(microbatch=(1, 2)) == pe.Costs(microbatch=[1.0, 2.0])


def test_lists_that_do_not_fit_the_file_are_refused(tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"forward": [1, 2, 3], "microbatch": [[1.0, 2.0]] * 2}))
    with pytest.raises(
        pe.InvalidArgument, match="'microbatch' in .* has 2 entries, for 2 stages, and 'forward'"
    ):
        pe.Costs.load(file)


@pytest.mark.parametrize(
    "factors, said",
    [
        ([1.0, 2.0], "microbatch has factors for 2 microbatches; give one for each of the 4 microbatches"),
        ([[1.0] * 4] * 3, "microbatch has lists for 3 stages; give one list for all, or one for each of the 2"),
    ],
)
def test_factors_that_do_not_fit_are_refused_wherever_they_are_used(factors, said, tmp_path):
    costs = pe.Costs(microbatch=factors)
    plan = built(("1f1b", 2, 4))
    uses = [
        lambda: pe.simulate(plan, costs),
        lambda: pe.microbatch_order(plan, costs),
        lambda: _C.lower_bound([0, 1], 2, 4, costs.by_stage(2, 2)),
        lambda: pe.build_plan("zb-auto", num_stages=2, microbatches=4, costs=costs),
        lambda: search(costs, num_ranks=2, microbatches=4, trials=5),
        lambda: search(costs, num_ranks=2, microbatches=(4, 2), chunks=(1, 2), trials=5),
        lambda: plan.draw(tmp_path / "plan.svg", costs),
    ]
    for use in uses:
        with pytest.raises(pe.InvalidSchedule, match=said):
            use()


def test_the_core_refuses_factors_of_another_shape():
    def costs(values, shape):
        given = {name: [1.0, 1.0] for name in ("forward", "backward", "input_grad", "weight_grad", "taken")} | {
            name: [0.0] for name in ("latency", "overhead", "transfer")
        }
        return _C.CostsByStage(
            **given, contention=1.0, pair=1.0, freed_by_input_grad=[], memory_limit=[],
            microbatch=values, microbatch_shape=shape,
        )  # fmt: skip

    for values, shape in (
        ([1.0], (0, 0, 0)),
        ([], (1, 4, 1)),
        ([1.0] * 8, (2, 4, 2)),
        ([1.0] * 4, (-1, -4, 1)),
        ([1.0] * 4, (2**16, 2**16, 4)),
    ):
        with pytest.raises(pe.InvalidSchedule, match=f"{len(values)} factors of microbatches do not fit"):
            costs(values, shape)
    for value in (math.nan, -1.0, math.inf):
        with pytest.raises(pe.InvalidSchedule, match="microbatch holds .*; a factor is finite and at least 0"):
            costs([1.0, value], (1, 2, 1))


def test_times_that_no_number_can_tell_are_refused():
    plan = built(("1f1b", 2, 2))
    costs = pe.Costs(forward=1e300, microbatch=[1e300, 1.0])
    for use in (pe.simulate, pe.microbatch_order):
        with pytest.raises(pe.InvalidSchedule, match="longer than a number can tell"):
            use(plan, costs)
