"""What holds of every simulated plan, whatever the placement, the order, the costs and the limits."""

import itertools
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_orders import NAMED, costs_for, is_sorted, needs, orders, parse

import pipeline_ext as pe
from pipeline_ext import _C

CLOSE = 1e-9
MODES = {"static": {}, "overlap": {"overlap": True}, "reactive": {"reactive": True}}
MODES["both"] = MODES["overlap"] | MODES["reactive"]


def built(schedule, **mode):
    if not isinstance(schedule, tuple):
        stages = 1 + max(s for row in schedule for cell in row for s, _, _ in parse(cell))
        microbatches = 1 + max(m for row in schedule for cell in row for _, _, m in parse(cell))
        return pe.build_plan(schedule, num_stages=stages, microbatches=microbatches, **mode)
    name, ranks, chunks, microbatches = schedule
    chunks = {"looped": chunks, "v": 2}.get(_C.layout_of(name), 1)
    return pe.build_plan(name, num_stages=ranks * chunks, num_ranks=ranks, microbatches=microbatches, **mode)


named = st.tuples(st.sampled_from(NAMED), st.integers(1, 4), st.integers(1, 3), st.integers(1, 8))
any_schedule = st.one_of(named, orders())


def tasks_of(plan):
    """(task, rank, stream) of each, numbered as in the plan."""
    described = [plan.describe(t) for t in range(len(plan))]
    return [((stage, kind, m), rank, stream) for kind, stage, m, rank, stream in described]


def cell_of_task(plan):
    """By task, the number of its cell in the whole plan."""
    cells = [cell for row in plan.order().values() for cell in row]
    return [number for number, cell in enumerate(cells) for _ in parse(cell)]


def peaks(plan, simulation, costs):
    """The most that each rank holds, by its events in time: what is freed at a moment may be taken in it."""
    ends = simulation.end
    events = defaultdict(list)
    for t, ((stage, kind, _), rank, _) in enumerate(tasks_of(plan)):
        taken, by_i = costs.act_memory[stage], costs.mem_i[stage]
        if kind == "F":
            events[rank].append((simulation.begin[t], 1, taken))
        freed = {"B": taken, "I": by_i, "W": taken - by_i}.get(kind, 0.0)
        events[rank].append((ends[t], 0, -freed))
    most = []
    for rank in range(plan.num_ranks):
        held, peak = 0.0, 0.0
        for _, _, change in sorted(events[rank]):
            held += change
            peak = max(peak, held)
        most.append(peak)
    return most


@settings(deadline=None)
@given(any_schedule, st.sampled_from(sorted(MODES)), st.data())
def test_a_simulated_plan_respects_dependencies_and_links(schedule, mode, data):
    plan = built(schedule, **MODES[mode])
    costs = data.draw(costs_for(plan))
    simulation = pe.simulate(plan, costs)
    begin, end = simulation.begin, simulation.end
    tasks = tasks_of(plan)
    at = {task: t for t, (task, _, _) in enumerate(tasks)}
    sent = defaultdict(list)  # by link, when a message may leave and when it has arrived
    for task, rank, _ in tasks:
        split_above = (task[0] + 1, "I", task[2]) in at
        for before in needs(task, plan.num_stages, split_above):
            boundary = min(task[0], before[0])
            arrived = end[at[before]]
            if tasks[at[before]][1] != rank:
                occupied = costs.message_bytes[boundary] / costs.bandwidth[boundary]
                arrived += costs.latency[boundary] + occupied
                at_the_latest = begin[at[task]] - costs.latency[boundary]
                sent[boundary, task[1] == "F"].append((end[at[before]], at_the_latest, occupied))
            assert begin[at[task]] >= arrived - CLOSE
    for messages in sent.values():  # a link carries one at a time: all that left from one moment on had to fit
        for left, _, _ in messages:
            later = [m for m in messages if m[0] >= left]
            assert max(m[1] for m in later) >= left + sum(m[2] for m in later) - 1e-6


@settings(deadline=None)
@given(any_schedule, st.sampled_from(sorted(MODES)), st.data())
def test_a_stream_runs_one_task_at_a_time_and_microbatches_keep_their_order(schedule, mode, data):
    plan = built(schedule, **MODES[mode])
    simulation = pe.simulate(plan, data.draw(costs_for(plan)))
    cells = cell_of_task(plan)
    by_stream = defaultdict(list)
    by_stage_and_kind = defaultdict(list)
    for t, ((stage, kind, _), rank, stream) in enumerate(tasks_of(plan)):
        begin, end = simulation.begin[t], simulation.end[t]
        by_stage_and_kind[stage, kind].append(begin)
        number = cells[t] if mode == "static" else -1 - t  # elsewhere a pair's parts are tasks like others
        by_stream[rank, stream if plan.overlap else ""].append((begin, end, number))
    for ran in by_stream.values():
        ran.sort(key=lambda r: (r[0], r[1]))
        for (_, end, cell), (begin, _, next_cell) in itertools.pairwise(ran):
            assert begin >= end - CLOSE or cell == next_cell
    assert all(is_sorted(begins) for begins in by_stage_and_kind.values())


@settings(deadline=None)
@given(any_schedule, st.data())
def test_the_clock_without_events_tells_what_the_clock_with_events_tells(schedule, data):
    plan = built(schedule)
    costs = data.draw(costs_for(plan)).by_stage(plan.num_stages, plan.num_ranks)
    costs = costs.with_noise(data.draw(st.sampled_from([0.0, 0.3])), 7)
    ours, theirs = (_C.simulate(plan, costs, by_events) for by_events in (False, True))
    for name in ("makespan", "begin", "first_start", "finish", "bubble", "bubble_from_first_start"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.peak_in_flight == theirs.peak_in_flight
    assert ours.peak_in_flight_of_stage == theirs.peak_in_flight_of_stage
    assert ours.peak_memory == pytest.approx(theirs.peak_memory)
    assert _C.end_times(plan, costs, ours) == _C.end_times(plan, costs, theirs)


@settings(deadline=None)
@given(any_schedule, st.sampled_from(sorted(MODES)), st.data())
def test_peak_memory_is_what_ranks_hold_in_time(schedule, mode, data):
    plan = built(schedule, **MODES[mode])
    costs = data.draw(costs_for(plan))
    simulation = pe.simulate(plan, costs)
    told = simulation.peak_memory
    if mode == "static":  # where a task takes no time, two orders of one moment's events are as good
        assert all(a >= b - CLOSE for a, b in zip(told, peaks(plan, simulation, costs)))
    elif all(b < e for b, e in zip(simulation.begin, simulation.end)):
        assert told == pytest.approx(peaks(plan, simulation, costs))


@settings(deadline=None)
@given(any_schedule, st.sampled_from(sorted(MODES)), st.data())
def test_a_limit_of_memory_that_the_order_needs_is_kept_in_every_mode_and_ends(schedule, mode, data):
    plan = built(schedule, **MODES[mode])
    costs = data.draw(costs_for(plan))
    needed = pe.simulate(built(schedule), costs).peak_memory
    limited = pe.Costs(**{**vars(costs), "memory_limit": needed})
    simulation = pe.simulate(plan, limited, noise=data.draw(st.sampled_from([0.0, 0.5])))
    assert all(held <= limit * (1 + CLOSE) for held, limit in zip(simulation.peak_memory, needed))
    # A plan that holds the limit itself is the same, and is refused where an order exceeds it.
    own = built(schedule, **MODES[mode], memory=limited)
    assert pe.simulate(own, limited).makespan == pe.simulate(plan, limited).makespan
    rank = data.draw(st.integers(0, plan.num_ranks - 1))
    limited.memory_limit[rank] *= 0.99
    with pytest.raises(pe.InvalidSchedule, match=f"(?s)rank {rank}, cell .*ERROR HERE") as refused:
        pe.simulate(plan, limited)
    with pytest.raises(pe.InvalidSchedule) as also_refused:
        built(schedule, **MODES[mode], memory=limited)
    assert str(refused.value) == str(also_refused.value)


@settings(deadline=None)
@given(any_schedule, st.booleans(), st.data())
def test_no_step_is_shorter_than_the_lower_bound(schedule, reactive, data):
    plan = built(schedule, reactive=reactive)
    costs = data.draw(costs_for(plan))
    simulation = pe.simulate(plan, costs)
    by_stage = costs.by_stage(plan.num_stages, plan.num_ranks)
    makespan, span = _C.lower_bound(plan.rank_of_stage, plan.num_ranks, plan.num_microbatches, by_stage)
    assert simulation.makespan >= makespan - CLOSE
    spans = [end - begin for begin, end in zip(simulation.first_start, simulation.finish)]
    assert max(spans) >= span - CLOSE


@settings(deadline=None)
@given(any_schedule, st.sampled_from(sorted(MODES)), st.data())
def test_an_exported_csv_comes_back_as_the_same_plan(schedule, mode, data):
    plan = built(schedule, **MODES[mode])
    costs = data.draw(costs_for(plan))
    cells = _C.cells_of_csv(plan.to_csv())
    again = built(cells, **MODES[mode])
    assert again.order() == plan.order()
    # A rule's preference and limits are not part of an order.
    if not (plan.reactive or plan.overlap) or not isinstance(schedule, tuple):
        assert pe.simulate(again, costs).begin == pe.simulate(plan, costs).begin


def test_the_lower_bound_is_reached_where_the_field_says_so():
    plan = pe.build_plan("1f1b", num_stages=4, microbatches=8)
    costs = pe.Costs(backward=2.0)
    bound, _ = _C.lower_bound([0, 1, 2, 3], 4, 8, costs.by_stage(4, 4))
    whole = pe.Costs(backward=2.0, input_grad=2.0, weight_grad=0.0)
    bound_unsplit, _ = _C.lower_bound([0, 1, 2, 3], 4, 8, whole.by_stage(4, 4))
    assert bound < bound_unsplit == pe.simulate(plan, costs).makespan == 3 * (8 + 3)
