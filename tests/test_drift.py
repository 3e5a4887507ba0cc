"""schedule="auto": when steps take another time than promised, a schedule is chosen anew, and not for ever."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from models import Residual
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext.lm.summary import Summary
from pipeline_ext.plan import drift as drift_module
from pipeline_ext.plan import schedule_choice
from pipeline_ext.plan.drift import STEPS, Drift
from pipeline_ext.plan.first_steps import FirstSteps


def looks(drift, seconds, times=1):
    """What is said, over so many times 20 steps of so many seconds, or of these."""
    said = []
    for _ in range(times):
        for each in seconds if isinstance(seconds, list) else [seconds] * STEPS:
            assert not drift.due
            drift.add(each)
        assert drift.due
        said.append(drift.look())
        drift.looked()
    return said


def begun(promised):
    drift = Drift()
    drift.begin(promised)
    return drift


@pytest.mark.parametrize("share", [0.91, 1.0, 1.09])
def test_a_promise_that_is_kept_is_the_reference(share):
    assert looks(begun(2.0), 2.0 * share, times=50) == [None] * 50


@pytest.mark.parametrize(
    "share, said", [(0.5, "50% less"), (0.88, "12% less"), (1.12, "12% more"), (3.0, "200% more")]
)
def test_a_change_in_either_direction_is_told(share, said):
    drift = begun(0.002)
    assert looks(drift, 0.002) == [None]
    (sentence,) = looks(drift, 0.002 * share)
    assert sentence == (
        f'schedule="auto": a step takes {2 * share:.2f} ms, {said} than the 2.00 ms promised; steps are '
        "measured and a schedule is chosen anew"
    )


def test_a_few_disturbed_steps_are_no_change():
    assert looks(begun(1.0), [1.0] * 11 + [100.0] * 9, times=9) == [None] * 9


@given(st.floats(1e-6, 10), st.floats(1e-3, 1e3))
def test_a_promise_that_is_always_missed_leads_to_one_new_choice(promised, share):
    drift = begun(promised)
    if looks(drift, promised * share) != [None]:
        drift.begin(promised)
    assert looks(drift, promised * share, times=20) == [None] * 20


def test_after_a_missed_promise_steps_are_compared_with_what_they_took():
    drift = begun(1.0)
    assert "30% more than the 1000.00 ms promised" in looks(drift, 1.3)[0]
    drift.begin(1.0)
    assert looks(drift, 1.3, times=3) == [None] * 3
    assert "23% more than the 1300.00 ms after the last choice" in looks(drift, 1.6)[0]
    drift.begin(1.6)  # this promise is kept
    assert looks(drift, 1.6, times=3) == [None] * 3
    assert "50% less than the 1600.00 ms promised" in looks(drift, 0.8)[0]


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=1, max_size=300))
def test_whatever_steps_take_choices_are_ever_rarer(times):
    drift, choices, at = begun(1.0), 1, []
    for n, seconds in enumerate(times, 1):
        if looks(drift, seconds) != [None]:
            drift.begin(1.0)
            choices += 1
            at.append(n)
    assert all(later - earlier >= 2**k for k, (earlier, later) in enumerate(itertools.pairwise(at), 1))
    assert choices <= 2 + math.log2(len(times))


@pytest.fixture
def steps(monkeypatch):
    """Looks after every 4 steps; the returned list holds the seconds that the last step took, or None."""
    monkeypatch.setattr(schedule_choice, "_SECONDS", None)
    monkeypatch.setattr(schedule_choice, "_TRIALS", 20)
    monkeypatch.setattr(drift_module, "STEPS", 4)
    seconds = [None]
    took = FirstSteps.took
    monkeypatch.setattr(FirstSteps, "took", lambda self, found: took(self, seconds[0] or found))
    return seconds


def test_a_pipeline_whose_steps_take_longer_measures_and_chooses_anew(steps, capsys, monkeypatch):
    monkeypatch.setattr(schedule_choice, "_WORTH", math.inf)  # so that the plan does change
    model = nn.Sequential(*(Residual(8) for _ in range(4)))
    plain = twin(model)
    with pe.Pipeline(model, 2, 6, "auto", F.mse_loss) as pipe:

        def step():
            x, y = torch.randn(2, 13, 8)
            model.zero_grad()
            plain.zero_grad()
            assert torch.equal(pipe.step(x, target=y), reference_step(plain, x, y, 6, F.mse_loss))
            assert_same_gradients(model, gradients(plain))
            return capsys.readouterr().out

        assert [bool(step()) for _ in range(3)] == [False] * 3
        assert step().startswith('schedule="auto": ')
        first = pipe.schedule_choice
        steps[0] = first.predicted
        assert [step() for _ in range(8)] == [""] * 8
        steps[0] = 2 * first.predicted
        assert [step() for _ in range(3)] == [""] * 3  # with the one before, these are four
        said = step()
        assert said.startswith('schedule="auto": a step takes ') and "100% more than the" in said
        assert said.count("\n") == 1
        assert pipe.schedule_choice is None and set(pipe.plan.kinds()) == {"F", "B"}
        assert [step() for _ in range(2)] == [""] * 2
        assert set(pipe.plan.kinds()) == {"F", "I", "W"}
        assert step() == f"{pipe.schedule_choice}\n"
        second = pipe.schedule_choice
        assert second is not first and pipe.plan is second.plan is pipe.trace.plan


def test_steps_that_raise_do_not_count(steps):
    class Failing(nn.Linear):
        fails = False

        def forward(self, x):
            if self.fails:
                raise RuntimeError("told to")
            return super().forward(x)

    layer, x = Failing(4, 4), torch.randn(8, 4)
    with pe.Pipeline(nn.Sequential(nn.Linear(4, 4), layer), 2, 4, "auto", F.mse_loss) as pipe:
        for _ in range(4):
            pipe.step(x, target=x)
        choice = pipe.schedule_choice
        steps[0] = choice.predicted
        for fails in [True, False] * 3:
            layer.fails = fails
            if fails:
                with pytest.raises(pe.StageError):
                    pipe.step(x, target=x)
            else:
                pipe.step(x, target=x)
        assert len(pipe._first_steps._drift._seconds) == 4


def test_no_other_schedule_and_no_evaluation_is_watched(steps):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    steps[0] = 1e9
    for settings in ({"schedule": "zb-h1"}, {"pack": "auto"}):
        with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, **settings) as pipe:
            for _ in range(12):
                pipe.step(x, target=x)
            assert not pipe._first_steps._drift.due
    with pe.Pipeline(model, 2, 4, "auto", F.mse_loss) as pipe:
        for _ in range(4):
            pipe.step(x, target=x)
        for _ in range(12):
            pipe.eval(x)
        assert not pipe._first_steps._drift.due


def test_gpus_are_not_watched(gpus, steps):
    steps[0] = 1e9
    model, x = nn.Sequential(*(Residual(8) for _ in range(2))), torch.randn(12, 8)
    with pe.Pipeline(model, 2, 6, "auto", F.mse_loss, devices=["cuda:0", "cuda:1"]) as pipe:
        for _ in range(12):
            pipe.step(x, target=x)
        assert pipe.schedule_choice is not None


def test_the_summary_of_a_training_is_of_the_last_choice():
    summary = Summary("auto", 2, 4, bubble_predicted=0.2, messages_per_step=16)
    plan = pe.build_plan("1f1b", num_stages=2, microbatches=4)
    choices = [pe.ScheduleChoice(plan, name, t, "1f1b", t, 1) for name, t in (("1f1b", 0.5), ("zb-h1", 0.25))]
    for choice, seconds in ((0, 0.6), (0, None), (0, 0.8), (1, 0.3), (1, 0.5), (1, 0.4)):
        summary.add_choice(choices[choice], seconds)
    found = summary.as_json()
    assert found["schedule_chosen"] == "zb-h1"
    assert (found["pipeline_ms_predicted"], found["pipeline_ms_measured"]) == (250, pytest.approx(400))
