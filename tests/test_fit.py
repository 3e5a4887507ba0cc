"""Times fitted to tokens: planted coefficients are found, and what cannot be told is said."""

import math
from random import Random
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import pipeline_ext as pe
from pipeline_ext.plan.fit import KINDS
from pipeline_ext.plan.profile import profile
from pipeline_ext.plan.records import Messages, task_records

STAGES, M = 2, 6


def size(entry):
    rows = [entry] if isinstance(entry, int) else entry
    return sum(rows), sum(row * row for row in rows)


def time_of(terms, entry):
    linear, quadratic, constant = terms
    tokens, squares = size(entry)
    return linear * tokens + quadratic * squares + constant


def measured(tokens, terms, schedule="zb-h1", noise=lambda seconds: seconds, overhead=0.0, stages=STAGES):
    """The trace of a step whose tasks took what ``terms`` (by kind and stage) say."""
    plan = pe.build_plan(schedule, num_stages=stages, microbatches=len(tokens))
    end = []
    for task in range(len(plan)):
        kind, stage, microbatch = plan.describe(task)[:3]
        sends = plan.num_messages_of(task) * overhead
        end.append(noise(time_of(terms[kind, stage], tokens[microbatch])) + sends)
    tasks = task_records(plan, [0.0] * len(plan), end)
    messages = [
        Messages(b, direction, len(tokens), 0, 0, overhead * len(tokens))
        for b in range(stages - 1)
        for direction in ("forward", "backward")
    ]
    return SimpleNamespace(plan=plan, tasks=tasks, profile=lambda: profile(plan, tasks, messages))


def terms_of(fit):
    return fit.linear, fit.quadratic, fit.constant


TERM = st.sampled_from([0.0, 0.5, 1.0, 2.0])


@st.composite
def planted(draw, kinds="FIW"):
    """By kind and stage: microseconds of a token, of a thousand pairs, and milliseconds of a microbatch."""
    scales = (1e-6, 1e-9, 1e-3)
    return {
        (kind, stage): tuple(draw(TERM) * scale for scale in scales)
        for kind in kinds
        for stage in range(STAGES)
    }


ROWS = st.lists(st.integers(1, 4000), min_size=1, max_size=4)
STEPS = st.lists(
    st.lists(st.one_of(st.integers(1, 4000), ROWS), min_size=M, max_size=M), min_size=3, max_size=3
)
DIFFERENT = [100, [700, 200], 3000, [1500] * 2, 4000, [10]]  # whatever else is drawn, sizes can be told apart


@given(STEPS, planted())
def test_what_was_planted_is_found(steps, terms):
    steps = [*steps, DIFFERENT]
    fitted = pe.fit_costs([measured(tokens, terms, overhead=1e-4) for tokens in steps], steps)
    for (kind, stage), wanted in terms.items():
        fit = fitted.fits[kind][stage]
        assert terms_of(fit) == pytest.approx(wanted, rel=1e-6, abs=1e-15)
        assert fit.fitted == pytest.approx(fit.measured) and fit.max_error < 1e-6
    assert fitted.fits["B"] == [None] * STAGES
    assert fitted.linear == pytest.approx(sum(linear for linear, _, _ in terms.values()))
    assert fitted.quadratic == pytest.approx(sum(quadratic for _, quadratic, _ in terms.values()), abs=1e-15)
    assert fitted.doubt == "" and fitted.steps == 4


@given(st.integers(0, 2**32), planted(kinds="FB"))
def test_with_noise_the_fit_is_near_and_no_term_is_negative(seed, terms):
    random = Random(seed)
    steps = [[random.randrange(1, 4000) for _ in range(M)] for _ in range(40)]
    noise = lambda seconds: seconds * random.uniform(0.9, 1.1)  # noqa: E731
    fitted = pe.fit_costs([measured(step, terms, "1f1b", noise) for step in steps], steps)
    for (kind, stage), wanted in terms.items():
        fit = fitted.fits[kind][stage]
        assert min(terms_of(fit)) >= 0
        assert fit.median_error < 0.15
        for tokens in (1000, 2000, 4000):
            assert time_of(terms_of(fit), tokens) == pytest.approx(time_of(wanted, tokens), rel=0.15)


@given(
    st.lists(st.tuples(st.integers(0, 3000), st.floats(0, 1e3)), min_size=M, max_size=M),
)
def test_whatever_is_measured_no_term_is_negative_and_no_other_fit_is_closer(samples):
    tokens = [n for n, _ in samples]
    terms = {("F", 0): (0, 0, 0), ("B", 0): (0, 0, 0)}
    times = iter([seconds for _, seconds in samples for _ in "FB"])
    trace = measured(tokens, terms, "gpipe", lambda _: next(times), stages=1)
    by_microbatch = {task.microbatch: task.end for task in trace.tasks if task.kind == "F"}
    fit = pe.fit_costs([trace], [tokens]).fits["F"][0]
    assert min(terms_of(fit)) >= 0

    def error(terms):
        return sum((time_of(terms, n) - by_microbatch[m]) ** 2 for m, n in enumerate(tokens))

    found = error(terms_of(fit))
    slack = 1e-9 * (1 + sum(seconds**2 for seconds in by_microbatch.values()))
    scales = (max(tokens) or 1, (max(tokens) or 1) ** 2, 1)
    step = 1e-3 * (1 + max(by_microbatch.values()))
    for term, scale in enumerate(scales):  # the error is convex: no neighbour is better, so nothing is
        for sign in (-1, 1):
            other = list(terms_of(fit))
            other[term] = max(0.0, other[term] + sign * step / scale)
            assert error(other) >= found - slack


def test_microbatches_of_one_size_give_a_constant_and_it_says_so():
    terms = {(kind, stage): (1e-6, 1e-9, 1e-3) for kind in "FB" for stage in range(STAGES)}
    tokens = [[512] * M] * 2
    fitted = pe.fit_costs([measured(step, terms, "1f1b") for step in tokens], tokens)
    seconds = time_of(terms["F", 0], 512)
    assert terms_of(fitted.fits["F"][0]) == (0, 0, pytest.approx(seconds))
    assert fitted.doubt.startswith("all microbatches are of one size, so time that grows with tokens cannot be")
    assert str(fitted).endswith(fitted.doubt)
    with pytest.raises(pe.InvalidArgument, match="linear and quadratic are both 0"):
        pe.balanced_microbatches([3, 4], 2, linear=fitted.linear, quadratic=fitted.quadratic)


@pytest.mark.parametrize(
    "step", [[512, 1024] * 3, [[128] * n for n in range(1, M + 1)]], ids=["two", "equal rows"]
)
def test_sizes_that_leave_terms_open_are_named_and_fitted_all_the_same(step):
    terms = {(kind, stage): (1e-6, 1e-9, 1e-3) for kind in "FB" for stage in range(STAGES)}
    fitted = pe.fit_costs([measured(step, terms, "1f1b")], [step])
    assert "too alike to tell linear, quadratic and constant time apart" in fitted.doubt
    fit = fitted.fits["F"][1]
    assert fit.quadratic == 0  # of fits as close, the one with tokens alone
    assert fit.max_error < 1e-9


def test_costs_and_factors_together_are_the_times_of_each_microbatch():
    terms = {
        ("F", 0): (1e-6, 0.0, 1e-3),
        ("B", 0): (2e-6, 1e-9, 0.0),
        ("F", 1): (0.0, 1e-9, 0.0),
        ("I", 1): (1e-6, 0.0, 0.0),
        ("W", 1): (0.0, 3e-9, 1e-3),
    }
    whole = {**terms, ("B", 1): terms["I", 1], ("I", 0): (0, 0, 0), ("W", 0): (0, 0, 0)}
    order = [
        ["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"],
        ["1F0", "1I0", "1W0", "1F1", "1I1", "1W1", "1F2", "1I2", "1W2"],
    ]
    steps = [[10, 4000, 700], [[30, 40], 2000, [900, 900]]]
    fitted = pe.fit_costs([measured(step, whole, order) for step in steps], steps)
    tokens = [100, [60, 60], 3000, 5]
    costs, factors = fitted.costs(tokens), fitted.factors(tokens)
    assert [len(factors), len(factors[0]), len(factors[0][0])] == [2, 4, 4]
    means = costs.times(2)
    for stage in range(2):
        for m, entry in enumerate(tokens):
            found = {k: means[k][stage] * factors[stage][m][i] for i, k in enumerate(KINDS)}
            found_terms = {k: time_of(terms[k, stage], entry) for k in KINDS if (k, stage) in terms}
            if stage == 0:
                found_terms |= {"I": found_terms["B"] / 2, "W": found_terms["B"] / 2}
            else:
                found_terms |= {"B": found_terms["I"] + found_terms["W"]}
            assert found == pytest.approx(found_terms)
    for of_kind in zip(*factors[0]):
        assert math.fsum(of_kind) == pytest.approx(len(tokens))


def test_a_stage_that_takes_no_time_has_factors_of_1():
    terms = {(kind, stage): (0, 0, 0) for kind in "FB" for stage in range(STAGES)}
    fitted = pe.fit_costs([measured(DIFFERENT, terms, "1f1b")], [DIFFERENT])
    assert fitted.factors([1, 2]) == [[[1.0] * 4] * 2] * STAGES
    assert fitted.fits["F"][0].max_error == 0


def test_the_table_shows_fitted_beside_measured_times():
    terms = {(kind, stage): (1e-6, 0.0, 1e-3 * (1 + stage)) for kind in "FB" for stage in range(STAGES)}
    tokens = [[1000, 1000, 1000, 2000, 3000, 4000]]
    text = str(pe.fit_costs([measured(tokens[0], terms, "1f1b")], tokens)).splitlines()
    assert text[0] == "seconds of a microbatch, fitted to 1 step; measured, fitted: medians"
    assert text[1].split() == "stage measured fitted median error max error a token a pair constant".split()
    assert text[2].split() == "0 F 2.500 ms 2.500 ms 0.0% 0.0% 1e-06 s 0 s 0.001 s".split()
    assert [line.split()[:2] for line in text[2:]] == [["0", "F"], ["0", "B"], ["1", "F"], ["1", "B"]]


def test_traces_of_real_steps(capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    rows = [8, 16, 32, 64]
    parts = [torch.randn(n, 64) for n in rows]
    traces = []
    with pe.Pipeline(model, 2, 4, "zb-h1", F.mse_loss) as pipe:
        for _ in range(3):
            pipe.step(arg_mbs=parts, target_mbs=parts)
            traces.append(pipe.trace)
        fitted = pe.fit_costs(traces, [torch.tensor(rows)] * 3)
        assert pipe.simulate(fitted.costs(rows)).makespan > 0
    assert fitted.fits["B"] == [None, None]
    for kind in "FIW":
        for fit in fitted.fits[kind]:
            assert min(terms_of(fit)) >= 0 < fit.measured


@pytest.mark.parametrize(
    "traces, tokens, said",
    [
        (0, [], r"traces is no list of traces, or empty; give pipe\.trace of one step or more"),
        (2, [[1] * M], r"tokens has 1 entries where there are 2 traces; give a list for each trace"),
        (1, 7, r"tokens is a int where there are 1 traces"),
        (1, [[1] * 5], r"tokens\[0\] has 5 microbatches and the step of traces\[0\] had 6"),
        (1, [7], r"tokens\[0\] is a int; give a list with an entry for each microbatch"),
        (1, ["abcdef"], r"tokens\[0\] is a str; give a list"),
        (1, [[1, 2, 3, 4, 5, -1]], r"tokens\[0\]\[5\] is -1; give a whole number from 0"),
        (1, [[1, 2, 3, 4, 5, math.nan]], r"tokens\[0\]\[5\] is nan; give a whole number"),
        (1, [[1, 2, 3, 4, 5, True]], r"tokens\[0\]\[5\] is True; give a whole number"),
        (1, [[1, 2, 3, [4, 0.5], 5, 6]], r"tokens\[0\]\[3\]\[1\] is 0\.5; give a whole number"),
    ],
)
def test_what_does_not_match_is_refused(traces, tokens, said):
    terms = {(kind, stage): (1e-6, 0.0, 0.0) for kind in "FB" for stage in range(STAGES)}
    with pytest.raises(pe.InvalidArgument, match=said):
        pe.fit_costs([measured([1] * M, terms, "1f1b")] * traces, tokens)


def test_what_is_no_trace_is_refused():
    # gather_trace() is None on the other ranks
    with pytest.raises(pe.InvalidArgument, match=r"traces\[1\] is a NoneType; give pipe\.trace after a step"):
        pe.fit_costs(
            [measured([1], dict.fromkeys([("F", 0), ("B", 0)], (0, 0, 1)), "gpipe", stages=1), None], [[1]] * 2
        )


def test_sizes_of_any_magnitude_are_fitted():
    terms = dict.fromkeys([("F", 0), ("B", 0)], (1e-9, 0.0, 0.5))
    tokens = [[2**31 - 1] * 9, [1], [2**31 - 1, 1], 2**30]
    fitted = pe.fit_costs([measured(tokens, terms, "gpipe", stages=1)], [tokens])
    assert fitted.fits["F"][0].max_error < 1e-6


def test_traces_of_other_pipelines_or_of_a_part_of_one_are_refused():
    terms = {(kind, stage): (1e-6, 0.0, 0.0) for kind in "FB" for stage in range(3)}
    two, three = (measured([1] * M, terms, "1f1b", stages=stages) for stages in (2, 3))
    with pytest.raises(pe.InvalidArgument, match=r"traces\[1\] has 3 stages and traces\[0\] 2"):
        pe.fit_costs([two, three], [[1] * M] * 2)
    two.tasks = [task for task in two.tasks if task.stage == 0]
    with pytest.raises(pe.InvalidArgument, match=r"no times of stage 1; .* those of gather_trace\(\)"):
        pe.fit_costs([two], [[1] * M])
    fitted = pe.fit_costs([three], [[1] * M])
    with pytest.raises(pe.InvalidArgument, match="tokens is empty; give the tokens of at least one microbatch"):
        fitted.costs([])
    with pytest.raises(pe.InvalidArgument, match=r"tokens\[0\] is -2; give a whole number"):
        fitted.factors([-2])
