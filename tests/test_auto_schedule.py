"""schedule="auto": what is measured, what is chosen, and where it can be seen."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models import Residual
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext.plan import schedule_choice
from pipeline_ext.plan.schedule_choice import choose, merged


def profile(stages, forward=1.0, backward=2.0, input_grad=1.0, weight_grad=1.0, latency=0.0):
    """What steps of equal stages would have measured."""

    def spread(value, count):
        return None if value is None else list(value) if isinstance(value, list) else [value] * count

    return pe.Profile(
        forward=spread(forward, stages),
        backward=spread(backward, stages),
        input_grad=spread(input_grad, stages),
        weight_grad=spread(weight_grad, stages),
        latency=spread(latency, stages - 1),
        overhead=[0.0] * (stages - 1),
        bandwidth=[math.inf] * (stages - 1),
        result_bytes=[0] * (stages - 1),
        packed=[True] * (stages - 1),
    )


def plans(stages, microbatches, num_ranks=None, **settings):
    def plan_of(schedule, memory=None):
        shape = {"num_stages": stages, "microbatches": microbatches, "num_ranks": num_ranks}
        return pe.build_plan(schedule, **shape, reactive=True, memory=memory, **settings)

    return plan_of


@pytest.fixture(autouse=True)
def by_count(monkeypatch):
    """The search ends after so many simulations, and not by the clock."""
    monkeypatch.setattr(schedule_choice, "_SECONDS", None)
    monkeypatch.setattr(schedule_choice, "_TRIALS", 50)


def test_where_weights_can_wait_the_backward_is_split():
    choice = choose(plans(4, 12), profile(4), "1f1b")
    at_first = pe.simulate(plans(4, 12)("1f1b"), profile(4).costs()).makespan
    known = pe.simulate(plans(4, 12)("zb-h1"), profile(4).costs()).makespan
    assert choice.predicted_first == at_first
    assert choice.predicted <= known < at_first
    assert choice.gain == pytest.approx(1 - choice.predicted / at_first)
    assert {"I", "W"} <= set(choice.plan.kinds())
    assert choice.plan.rank_of_stage == [0, 1, 2, 3] and choice.plan.reactive
    assert choice.simulated > 4  # the first, three more by name, and what the search tried


def test_where_splitting_costs_what_it_saves_the_first_schedule_stays():
    dear = profile(4, input_grad=2.0, weight_grad=1.5)
    choice = choose(plans(4, 12), dear, "1f1b")
    assert choice.schedule == choice.first == "1f1b"
    assert choice.gain == 0.0
    assert choice.plan.order() == plans(4, 12)("1f1b").order()
    assert "none of" in str(choice)


def test_the_same_profile_leads_to_the_same_choice():
    uneven = profile(4, forward=[1.0, 2.0, 1.5, 1.0], latency=0.1)
    one, other = (choose(plans(4, 8), uneven, "1f1b") for _ in range(2))
    assert one.plan.order() == other.plan.order()
    assert (one.schedule, one.predicted, one.simulated) == (other.schedule, other.predicted, other.simulated)


def test_no_rank_holds_more_microbatches_than_one_did_at_first_unless_allowed():
    costs = profile(4, latency=0.5)
    peak = max(pe.simulate(plans(4, 16)("1f1b"), costs.costs()).peak_in_flight)
    choice = choose(plans(4, 16), costs, "1f1b")
    assert max(pe.simulate(choice.plan, costs.costs()).peak_in_flight) <= peak == 4
    limits = [8, 8, 8, 8]
    roomy = choose(plans(4, 16, in_flight=limits), costs, "1f1b", limits)
    assert max(pe.simulate(roomy.plan, costs.costs()).peak_in_flight) <= 8
    assert roomy.predicted <= choice.predicted
    tight = choose(plans(4, 16, in_flight=2), costs, "1f1b", [2] * 4)
    assert max(pe.simulate(tight.plan, costs.costs()).peak_in_flight) <= 2


def test_stages_stay_on_their_ranks():
    for ranks, first in ((4, "zbv"), (2, "interleaved-1f1b")):
        plan_of = plans(8, 8, ranks)
        choice = choose(plan_of, profile(8), first)
        assert choice.plan.rank_of_stage == plan_of(first).rank_of_stage


def test_b_is_of_steps_that_ran_it_and_i_and_w_of_those_that_split_it():
    whole = [profile(2, backward=b, input_grad=None, weight_grad=None) for b in (2.5, 2.0)]
    split = profile(2, forward=0.5, backward=3.0, input_grad=1.25, weight_grad=1.75)
    found = merged([*whole, split])
    assert found == profile(2, forward=0.5, backward=2.0, input_grad=1.25, weight_grad=1.75)
    assert merged(whole).input_grad is None
    assert merged([split] * 3) == split


def pipeline(model, **settings):
    return pe.Pipeline(model, schedule="auto", loss_fn=F.mse_loss, microbatches=6, **settings)


@pytest.mark.parametrize("stages, devices", [(3, None), (4, ["cpu"] * 2), (6, ["cpu"] * 2)])
def test_gradients_are_the_reference_s_before_and_after_the_choice(stages, devices, capsys, monkeypatch):
    monkeypatch.setattr(schedule_choice, "_WORTH", math.inf)  # so that it does change
    model = nn.Sequential(*(Residual(8) for _ in range(6)))
    plain = twin(model)
    with pipeline(model, num_stages=stages, devices=devices) as pipe:
        placed = pipe.plan.rank_of_stage
        for step in range(1, 6):
            x, y = torch.randn(2, 13, 8)
            model.zero_grad()
            plain.zero_grad()
            expected = reference_step(plain, x, y, 6, F.mse_loss)
            assert torch.equal(pipe.step(x, target=y), expected)
            assert_same_gradients(model, gradients(plain))
            assert ('schedule="auto": ' in capsys.readouterr().out) == (step == 4)
            assert (pipe.schedule_choice is not None) == (step > 3)
            assert pipe.plan.rank_of_stage == placed
        assert pipe.plan is pipe.trace.plan is pipe.schedule_choice.plan
        assert pipe.pack_choice is None


def test_the_third_step_splits_the_backward_so_that_i_and_w_are_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(schedule_choice, "choose", lambda plan_of, profile, *_: seen.append(profile) or 1 / 0)
    x = torch.randn(12, 8)
    with pipeline(nn.Sequential(*(Residual(8) for _ in range(2))), num_stages=2) as pipe:
        kinds = []
        for _ in range(3):
            pipe.step(x, target=x)
            kinds.append(set(pipe.plan.kinds()))
        assert kinds == [{"F", "B"}, {"F", "B"}, {"F", "I", "W"}]
        with pytest.raises(ZeroDivisionError):
            pipe.step(x, target=x)
    (found,) = seen
    assert min(found.input_grad + found.weight_grad + found.backward + found.forward) > 0


def test_a_search_that_ctrl_c_ends_stops_the_step_and_is_made_at_the_next(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    with pipeline(model, num_stages=2) as pipe:
        for _ in range(3):
            pipe.step(x, target=x)
        plan, before = pipe.plan, [p.grad.clone() for p in model.parameters()]
        search = schedule_choice.search

        def stopped(*args, **settings):
            return replace(search(*args, **settings), interrupted=True)

        with monkeypatch.context() as patch:
            patch.setattr(schedule_choice, "search", stopped)
            with pytest.raises(KeyboardInterrupt):
                pipe.step(x, target=x)
        assert pipe.plan is plan and pipe.schedule_choice is None
        assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before))
        pipe.step(x, target=x)
        assert pipe.schedule_choice is not None


def test_the_choice_is_in_the_saved_trace_and_drawn_below_its_plan(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    from pipeline_ext.report import picture

    monkeypatch.setattr(schedule_choice, "_WORTH", math.inf)
    drawn = []
    draw = picture.figure
    monkeypatch.setattr(picture, "figure", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    x = torch.randn(12, 8)
    with pipeline(nn.Sequential(*(Residual(8) for _ in range(2))), num_stages=2) as pipe:
        for _ in range(4):
            pipe.step(x, target=x)
        pipe.trace.save(tmp_path / "trace.json")
        pipe.trace.save(tmp_path / "timeline.png")
        assert pipe.trace.schedule_choice is pipe.schedule_choice
        saved = json.loads((tmp_path / "trace.json").read_text())["otherData"]
        assert saved == {"schedule_choice": str(pipe.schedule_choice)}
        planned, measured = (len(ax.collections[0].get_paths()) for ax in drawn[0].axes)
        assert planned == measured == sum(task.kind in "FBIW" for task in pipe.trace.tasks)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"pack": "auto"}, 'schedule="auto" and pack="auto" would both choose from the first three steps'),
        ({"graphs": True}, "takes another plan as the fourth step begins, and graphs=True"),
        ({"devices": ["cpu"] * 3}, "holds the same number of stages on each rank"),
    ],
)
def test_what_auto_does_not_go_with_is_refused(settings, said):
    with pytest.raises(pe.InvalidArgument, match=said):
        pipeline(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), num_stages=2, **settings)


def test_on_gpus_too(gpus, monkeypatch):
    monkeypatch.setattr(schedule_choice, "_WORTH", math.inf)
    model = nn.Sequential(*(Residual(8) for _ in range(4)))
    plain = twin(model)
    with pipeline(model, num_stages=4, devices=["cuda:0", "cuda:1"]) as pipe:
        for _ in range(5):
            x, y = torch.randn(2, 13, 8)
            model.zero_grad()
            plain.zero_grad()
            expected = reference_step(plain, x, y, 6, F.mse_loss)
            assert torch.equal(pipe.step(x, target=y), expected)
            assert_same_gradients(model, gradients(plain))
        assert pipe.plan is pipe.schedule_choice.plan
