"""Every schedule whose order its name alone says, at any size that it accepts."""

import re
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_orders import rank_operations, texts

import pipeline_ext as pe
from pipeline_ext import _C

CHUNKS = {"linear": [1], "looped": [1, 2, 3], "v": [2], "bidirectional": [1]}


@st.composite
def sizes(draw):
    """A schedule, and how many stages, ranks and microbatches it is given."""
    schedule = draw(st.sampled_from(_C.schedule_names()))
    layout = _C.layout_of(schedule)
    ranks = draw(st.sampled_from([2, 4, 6] if layout == "bidirectional" else [1, 2, 3, 4, 5, 8]))
    chunks = draw(st.sampled_from(CHUNKS[layout]))
    return schedule, ranks * chunks, ranks, draw(st.integers(1, 20))


def parts(action):
    stage, kind, microbatch = re.fullmatch(r"(\d+)([A-Z]+)(\d+)", action).groups()
    return int(stage), kind, int(microbatch)


def by_rank(plan):
    """The actions of each rank, overlapped pairs taken apart."""
    split = re.compile(r"\d+[FBIW]\d+")
    return {r: [parts(a) for a in split.findall(" ".join(row))] for r, row in plan.order().items()}


@settings(max_examples=300, deadline=None)
@given(sizes(), st.booleans(), st.booleans())
def test_every_size_gives_a_whole_step(size, overlap, reactive):
    schedule, stages, ranks, m = size
    plan = pe.build_plan(
        schedule, num_stages=stages, num_ranks=ranks, microbatches=m, overlap=overlap, reactive=reactive
    )
    listed = Counter(action for row in by_rank(plan).values() for action in row)
    assert set(listed.values()) == {1}
    for stage in range(stages):
        for microbatch in range(m):
            kinds = {kind for s, kind, n in listed if (s, n) == (stage, microbatch)}
            assert kinds in ({"F", "B"}, {"F", "I", "W"})
    assert len(listed) == len(plan)
    # Read back it is checked as any order is, and is the same plan.
    again = _C.plan_of_cells(list(plan.order().values()), overlap=overlap, reactive=False)
    assert again.order() == plan.order()
    assert again.rank_of_stage == plan.rank_of_stage
    assert pe.simulate(plan).makespan > 0


@settings(max_examples=200, deadline=None)
@given(sizes())
def test_a_stage_takes_its_microbatches_in_ascending_order(size):
    schedule, stages, ranks, m = size
    plan = pe.build_plan(schedule, num_stages=stages, num_ranks=ranks, microbatches=m)
    for row in by_rank(plan).values():
        by_stage = defaultdict(list)
        for stage, kind, microbatch in row:
            by_stage[stage, kind].append(microbatch)
            if kind in "BW":  # what adds to the gradients, whole or in part
                by_stage[stage, "gradients"].append(microbatch)
        assert all(microbatches == sorted(microbatches) for microbatches in by_stage.values())


@pytest.mark.parametrize("schedule", _C.schedule_names())
def test_one_microbatch_needs_no_more_than_its_own_way(schedule):
    looped = _C.layout_of(schedule) in ("looped", "v")
    plan = pe.build_plan(schedule, num_stages=8 if looped else 4, num_ranks=4, microbatches=1)
    simulation = pe.simulate(plan)
    # Forth and back, with a W behind the last I at most.
    assert simulation.makespan <= plan.num_stages * 3


@pytest.mark.parametrize(
    "schedule, stages, ranks, message",
    [
        ("zb-h1", 4, 2, "'zb-h1' holds exactly one stage on each rank, got 4 stages on 2 ranks"),
        ("zbv", 6, 2, "'zbv' holds exactly two stages on each rank, got 6 stages on 2 ranks"),
        ("looped-bfs", 5, 2, "'looped-bfs' holds the same number of stages on each rank, got 5 stages"),
        ("dualpipe", 3, 3, "on an even number of ranks, got 3 stages on 3 ranks"),
        ("v-half", 3, None, "'v-half' holds two stages on each rank, so num_stages is even; got 3"),
    ],
)
def test_what_a_schedule_cannot_place_is_refused(schedule, stages, ranks, message):
    with pytest.raises(pe.InvalidSchedule, match=message):
        pe.build_plan(schedule, num_stages=stages, num_ranks=ranks, microbatches=4)


def test_by_default_a_rank_holds_as_many_stages_as_the_schedule_is_for():
    ranks = {name: pe.build_plan(name, num_stages=8, microbatches=4).num_ranks for name in _C.schedule_names()}
    assert ranks["zbv"] == ranks["v-half"] == ranks["dualpipev"] == ranks["looped-bfs"] == 4
    assert ranks["zb-h1"] == ranks["dualpipe"] == 8


def test_dualpipe_shares_the_microbatches_between_two_copies():
    plan = pe.build_plan("dualpipe", num_stages=4, microbatches=9)
    assert plan.rank_of_stage == [0, 1, 2, 3]
    assert plan.rank_of_copy == [3, 2, 1, 0]
    for rank, row in by_rank(plan).items():
        assert {stage for stage, _, m in row if m < 5} == {rank}
        assert {stage for stage, _, m in row if m >= 5} == {3 - rank}
    assert plan.num_messages == 2 * 3 * 9


@pytest.mark.parametrize("ranks", range(1, 6))
@pytest.mark.parametrize("ours, theirs, least", [("zbv", "ZBVZeroBubble", 1), ("dualpipev", "DualPipeV", 2)])
def test_v_schedules_of_torch_have_the_same_order(ours, theirs, least, ranks):
    for microbatches in range(1 if least == 1 else 2 * ranks, 4 * ranks + 2):
        plan = pe.build_plan(ours, num_stages=2 * ranks, num_ranks=ranks, microbatches=microbatches)
        assert plan.order() == texts(rank_operations(f"Schedule{theirs}", ranks, 2, microbatches))


@pytest.mark.parametrize("ranks, chunks, microbatches", [(1, 1, 3), (2, 3, 4), (4, 2, 8), (3, 2, 5)])
def test_looped_bfs_is_torchs_order_but_for_backwards_that_ascend(ranks, chunks, microbatches):
    plan = pe.build_plan("looped-bfs", num_stages=ranks * chunks, num_ranks=ranks, microbatches=microbatches)
    theirs = texts(rank_operations("ScheduleLoopedBFS", ranks, chunks, microbatches))
    for rank, row in plan.order().items():
        turned = [
            f"{stage}{kind}{microbatches - 1 - m if kind == 'B' else m}"
            for stage, kind, m in map(parts, theirs[rank])
        ]
        assert row == turned
