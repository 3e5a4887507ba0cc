"""Every schedule against the figures published for it; conventions are in the tables' README.

In the tables, as in the papers, B is the input-gradient part of the backward, our I.
"""

import csv
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import pipeline_ext as pe

TABLES = Path(__file__).parent / "tables"


def rows(table):
    with (TABLES / f"{table}.csv").open() as file:
        return list(csv.DictReader(file))


def ident(row):
    names = ("model", "schedule", "p", "ranks", "m", "microbatches", "F", "B", "W", "FB")
    return "-".join(row[name] for name in names if name in row)


def simulated(schedule, ranks, chunks, microbatches, f, i, w, latency=0.0, pair=1.0):
    """The simulated step, with the times of one stage."""
    plan = pe.build_plan(schedule, num_stages=ranks * chunks, num_ranks=ranks, microbatches=microbatches)
    costs = pe.Costs(forward=f, backward=i + w, input_grad=i, weight_grad=w, latency=latency, pair=pair)
    return pe.simulate(plan, costs)


def span(simulation):
    """The largest time over ranks from a rank's own first begin to its last end."""
    first, last = {}, {}
    for task, (begin, end) in enumerate(zip(simulation.begin, simulation.end)):
        rank = simulation.plan.describe(task)[3]
        first[rank] = min(begin, first.get(rank, begin))
        last[rank] = max(end, last.get(rank, end))
    return max(last[rank] - first[rank] for rank in first)


ZERO_BUBBLE = [
    (row, *(float(row[column]) for column in columns))
    for table, columns in (
        ("zb_iclr24_table5_6", ("T_F_ms", "T_B_ms", "T_W_ms", "T_comm_ms")),
        ("zb_arxiv_zbv_bubbles", ("F_us_stage", "B_us_stage", "W_us_stage", "comm_us")),
    )
    for row in rows(table)
]


@pytest.mark.parametrize("row, f, i, w, latency", ZERO_BUBBLE, ids=[ident(case[0]) for case in ZERO_BUBBLE])
def test_bubbles_match_the_tables_of_the_zero_bubble_papers(row, f, i, w, latency):
    ranks, m, chunks = int(row["p"]), int(row["m"]), int(row["vpp_chunks"])
    ideal = m * (f + i + w)

    def bubble(schedule, cost, chunks=1):
        times = (f / chunks, i / chunks, w / chunks)
        return f"{1 - ideal / cost(simulated(schedule, ranks, chunks, m, *times, latency)):.4f}"

    def latest_finish(simulation):
        return simulation.makespan

    assert bubble("1f1b", latest_finish) == row["bubble_1F1B"]
    interleaved = bubble("interleaved-1f1b", latest_finish, chunks)
    assert interleaved == row["bubble_1F1B-I_all_wraparound_edges"]
    assert bubble("zb-h1", latest_finish) == row["bubble_ZB-H1"]
    assert bubble("zb-h2", span) == row["bubble_ZB-H2"]


TIMES = st.integers(1, 30)
FEW = settings(max_examples=60, deadline=None)


@FEW
@given(st.integers(1, 12), st.integers(1, 40), TIMES, TIMES, TIMES)
def test_1f1b_has_its_closed_form(p, m, f, i, w):
    assert simulated("1f1b", p, 1, m, f, i, w).makespan == (m + p - 1) * (f + i + w)


@FEW
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), TIMES, TIMES, TIMES)
def test_interleaved_1f1b_has_its_closed_form(p, groups, chunks, f, i, w):
    m = groups * p
    makespan = simulated("interleaved-1f1b", p, chunks, m, f, i, w).makespan
    assert makespan == (m * chunks + p - 1) * (f + i + w)


@FEW
@given(st.integers(1, 12), st.integers(0, 20), TIMES, TIMES, TIMES)
def test_zb_h1_has_its_closed_form(p, more, f, i, w):
    assume(w <= min(f, i))
    m = 2 * p + more
    assert simulated("zb-h1", p, 1, m, f, i, w).makespan == m * (f + i + w) + (p - 1) * (f + i - w)


@FEW
@given(st.integers(1, 12), st.integers(0, 20), TIMES, TIMES, TIMES, st.integers(0, 5))
def test_zb_h2_has_its_closed_form(p, more, f, i, w, latency):
    assume(w <= min(f, i) and 2 * latency <= w)
    m = 2 * p + more
    bubble = (p - 1) * (f + i + 2 * latency - 2 * w)
    assert span(simulated("zb-h2", p, 1, m, f, i, w, latency)) == m * (f + i + w) + bubble


@FEW
@given(st.integers(1, 12), st.integers(0, 20))
def test_zb_h2_and_zbv_leave_no_bubble_between_passes_of_one_length(p, more):
    assert span(simulated("zb-h2", p, 1, 2 * p + more, 1, 1, 1)) == 3 * (2 * p + more)
    zbv = simulated("zbv", p, 2, 2 * p + more, 1, 1, 1)
    assert span(zbv) == 2 * 3 * (2 * p + more)
    assert max(zbv.peak_in_flight) == 2 * p


@pytest.mark.parametrize("row", rows("dualpipe_reference"), ids=ident)
def test_dualpipe_has_the_bubbles_and_peaks_of_its_reference(row):
    schedule, ranks, m = row["schedule"].lower(), int(row["ranks"]), int(row["microbatches"])
    f, i, w, paired = (float(row[x]) for x in ("F", "B", "W", "FB"))
    chunks = int(row["pp_stages"]) // ranks
    simulation = simulated(schedule, ranks, chunks, m, f, i, w, pair=paired / (f + i + w))
    bubbles = [simulation.makespan * bubble for bubble in simulation.bubble_by_rank]
    assert simulation.makespan == pytest.approx(float(row["makespan"]), abs=1e-9)
    assert min(bubbles) == pytest.approx(float(row["bubble_min"]), abs=1e-9)
    assert max(bubbles) == pytest.approx(float(row["bubble_max"]), abs=1e-9)
    assert simulation.peak_in_flight == [int(row["peak_act_per_rank"])] * ranks


@FEW
@given(
    st.sampled_from(["dualpipe", "dualpipev"]), st.integers(1, 4), st.integers(0, 4),
    st.sampled_from([(1, 1, 1, 3), (2, 2, 1, 5), (10, 10, 7, 27), (2, 2, 2, 5)]),
)  # fmt: skip
def test_dualpipe_has_its_closed_form(schedule, depth, more, times):
    f, i, w, paired = times
    ranks, chunks = (2 * depth, 1) if schedule == "dualpipe" else (depth, 2)
    m = 2 * ranks + 2 * more
    simulation = simulated(schedule, ranks, chunks, m, f, i, w, pair=paired / (f + i + w))
    bubble = max(simulation.bubble_by_rank) * simulation.makespan
    # Written for DualPipe's PP = 2 * depth ranks; folded, DualPipeV has half of them.
    assert bubble == pytest.approx((depth - 1) * (paired + (i + w) - 3 * w), abs=1e-6)
    assert max(simulation.peak_in_flight) == 2 * depth + 1


@pytest.mark.parametrize("row", rows("v_schedule_reference"), ids=ident)
def test_v_schedules_hold_what_their_reference_holds_and_take_no_longer(row):
    p, m = int(row["p"]), int(row["m"])
    times = (float(row[x]) for x in ("F", "B", "W", "comm"))
    simulation = simulated(row["schedule"].lower(), p, 2, m, *times)
    assert span(simulation) <= float(row["makespan"])
    assert max(simulation.peak_in_flight) == int(row["peak_half_chunks"])


@pytest.mark.parametrize("p", range(1, 33))
def test_v_schedules_hold_what_their_formulas_say(p):
    for m in (2 * p, 3 * p + 1):
        for schedule, microbatches in (("v-half", (p + 2) // 2), ("v-min", (p + 4) // 3)):
            simulation = simulated(schedule, p, 2, m, 1, 1, 1)
            assert max(simulation.peak_in_flight) == 2 * microbatches
