"""pack="auto": what is measured, what is chosen, and where it can be seen."""

import itertools
import json
import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipeline_ext as pe
from pipeline_ext.plan import pack_choice
from pipeline_ext.plan.pack_choice import choose
from pipeline_ext.transport.link import LocalLink, imitated_link


def profile(stages, forward=1.0, backward=2.0, latency=0.0, overhead=0.0, bandwidth=math.inf, nbytes=0):
    """What a step of equal stages would have measured."""

    def spread(value, count):
        return list(value) if isinstance(value, list) else [value] * count

    return pe.Profile(
        forward=spread(forward, stages),
        backward=spread(backward, stages),
        latency=spread(latency, stages - 1),
        overhead=spread(overhead, stages - 1),
        bandwidth=spread(bandwidth, stages - 1),
        result_bytes=spread(nbytes, stages - 1),
        packed=[True] * (stages - 1),
    )


def plans(stages, microbatches, schedule="1f1b", **settings):
    def plan_of(packs, packs_forward, room=()):
        return pe.build_plan(
            schedule, num_stages=stages, microbatches=microbatches, reactive=True,
            packs=packs, packs_forward=packs_forward, room=room, **settings,
        )  # fmt: skip

    return plan_of


def test_free_messages_leave_alone():
    for schedule in pe.schedule_names():
        choice = choose(plans(4, 16, schedule), profile(4))
        assert choice.packs == choice.packs_forward == [1, 1, 1]
        assert choice.gain == 0.0


def test_dear_messages_leave_together():
    """Four ranks, 64 microbatches, half an F for each message: K = 4 is best, as replayed orders say."""
    choice = choose(plans(4, 64), profile(4, overhead=0.5), packs_forward=[1, 1, 1])
    assert choice.packs_forward == [1, 1, 1]
    by_k = {
        k: pe.simulate(plans(4, 64)([k] * 3, [1] * 3), pe.Costs(overhead=0.5)).makespan
        for k in (1, 2, 4, 8, 64)
    }
    assert by_k[4] == min(by_k.values()) < 0.98 * by_k[1]
    assert choice.predicted <= 1.01 * by_k[4]  # a smaller K is taken where it hardly matters
    assert choice.gain == pytest.approx(1 - choice.predicted / choice.predicted_at_1)


def test_what_more_microbatches_in_flight_save_is_not_packing_s():
    """They hide latency, with K = 1 as well: what a K saves is counted in the same memory."""
    for schedule in ("1f1b", "interleaved-1f1b"):
        for latency in (0.25, 1.0, 2.0):
            for given in (None, [1] * 3):
                choice = choose(plans(4, 32, schedule), profile(4, latency=latency), packs_forward=given)
                assert choice.packs == choice.packs_forward == [1, 1, 1]
                assert choice.plan.limits == plans(4, 32, schedule)([1] * 3, [1] * 3).limits
    costs = profile(4, latency=1.0, overhead=1.0)
    choice = choose(plans(4, 64), costs)
    assert max(choice.packs + choice.packs_forward) > 1
    alone = [plans(4, 64)([1] * 3, [1] * 3, room) for room in ((), choice.plan.limits)]
    natural, with_room = (pe.simulate(plan, costs.costs(plan)).makespan for plan in alone)
    assert choice.predicted_at_1 == with_room < natural
    assert choice.predicted <= 0.98 * with_room


def test_both_directions_are_chosen_together():
    costs = profile(8, overhead=1.0)
    grid = [
        plans(8, 64)([k] * 7, [k_forward] * 7)
        for k, k_forward in itertools.product((1, 2, 4, 8, 16, 32, 64), repeat=2)
    ]
    best = min(pe.simulate(plan, costs.costs(plan)).makespan for plan in grid)
    assert choose(plans(8, 64), costs).predicted <= best / 0.98


def test_when_time_is_up_the_best_so_far_is_taken(monkeypatch):
    simulated = []

    def simulate(*args):
        simulated.append(pe.simulate(*args))
        return simulated[-1]

    monkeypatch.setattr(pack_choice, "simulate", simulate)
    monkeypatch.setattr(pack_choice, "time", SimpleNamespace(monotonic=lambda: len(simulated)))
    monkeypatch.setattr(pack_choice, "_SECONDS", 5)
    choice = choose(plans(4, 64), profile(4, overhead=1.0))
    assert choice.simulated == len(simulated) in (7, 8)
    assert 1 < max(choice.packs + choice.packs_forward) < 64
    assert choice.predicted < choice.predicted_at_1


def test_each_boundary_has_a_k_of_its_own():
    """The stage that is busiest sends over the one or the other."""
    for boundary, backward in enumerate(([2.0, 5.0, 2.0], [2.0, 2.0, 5.0])):
        overhead = [2.0 * (b == boundary) for b in range(2)]
        costs = profile(3, backward=backward, overhead=overhead)
        packs = choose(plans(3, 64), costs, packs_forward=[1, 1]).packs
        assert packs[boundary] > packs[1 - boundary]


def test_activations_pack_too_if_asked():
    costs = profile(4, overhead=2.0)
    both, gradients = choose(plans(4, 64), costs), choose(plans(4, 64), costs, packs_forward=[1] * 3)
    assert max(both.packs_forward) > 1
    assert both.predicted < gradients.predicted


def test_a_k_that_the_limits_forbid_is_not_chosen():
    costs = profile(4, overhead=2.0)
    free = choose(plans(4, 32), costs, packs_forward=[1] * 3)
    assert max(free.plan.limits) > 4
    bound = choose(plans(4, 32, in_flight=[4] * 4), costs, packs_forward=[1] * 3)
    assert max(bound.plan.limits) <= 4
    assert max(bound.packs) <= 4


def test_the_link_s_bandwidth_counts():
    plan = plans(2, 8)([1], [1])
    slow = pe.simulate(plan, pe.Costs(bandwidth=1.0, message_bytes=10.0)).makespan
    assert slow >= 8 * 10.0  # each direction has a link of its own, and eight messages to carry


def test_a_message_of_a_group_takes_as_long_as_its_bytes():
    plan = pe.build_plan("gpipe", num_stages=2, microbatches=4, packs=[4])
    costs = pe.Costs(forward=1.0, backward=2.0, latency=0.25, overhead=0.5, bandwidth=2.0, message_bytes=3.0)
    simulation = pe.simulate(plan, costs)
    # F sends after 1.5; the link carries 1.5 for each; the last arrives at 1.5 * 4 + 1.5 + 0.25. Then F and
    # the four B of stage 1, the message's overhead, its four results on the link, and the B of stage 0.
    assert simulation.makespan == pytest.approx(7.75 + 1 + 4 * 2 + 0.5 + 4 * 1.5 + 0.25 + 4 * 2)


@pytest.mark.parametrize("name", ["bandwidth", "overhead", "message_bytes"])
def test_costs_of_links_that_cannot_be(name):
    plan = plans(2, 4)([1], [1])
    with pytest.raises(pe.InvalidSchedule):
        pe.simulate(plan, pe.Costs(**{name: -1.0}))


class Wait(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        time.sleep(self.seconds)
        return self.layer(x)


def test_a_step_tells_what_messages_cost():
    x = torch.randn(8, 4)
    with (
        imitated_link(LocalLink(overhead=0.03)),
        pe.Pipeline([Wait(0.001) for _ in range(3)], microbatches=4, loss_fn=F.mse_loss) as pipe,
    ):
        for _ in range(20):  # beside other programs a step may wait for a core in any of its parts
            pipe.step(x, target=x)
            found = pipe.profile()
            assert all(overhead >= 0.03 for overhead in found.overhead)
            assert all(forward >= 0.001 for forward in found.forward)
            assert all(latency >= 0 for latency in found.latency)
            parts = (*found.forward, *found.backward, *found.latency)
            if max(found.overhead) < 0.06 and max(parts) < 0.03:
                break
        else:
            raise AssertionError(f"what a message costs is counted elsewhere: {found}")
        assert found.result_bytes == [2 * 4 * 4] * 2
        assert found.packed == [False, False]


@pytest.mark.parametrize("trace", [True, False])
def test_as_the_fourth_step_begins_a_pipeline_chooses_and_says_so(trace, capsys, tmp_path):
    x = torch.randn(16, 4)
    with (
        imitated_link(LocalLink(overhead=0.004)),
        pe.Pipeline(
            [Wait(0.0005) for _ in range(4)], microbatches=16, loss_fn=F.mse_loss, pack="auto", trace=trace
        ) as pipe,
    ):
        for step in range(1, 6):
            pipe.step(x, target=x)
            printed = capsys.readouterr().out
            assert ("a step is predicted to take" in printed) == (step == 4)
            assert (max(pipe.plan.packs) > 1) == (step > 3) == (pipe.pack_choice is not None)
            if trace:
                assert pipe.trace.pack_choice is pipe.pack_choice
                sent = sum(m.count for m in pipe.trace.messages if m.direction == "backward")
                packs = pipe.trace.plan.packs
                assert sent == sum(math.ceil(16 / k) for k in packs) and (sent < 48) == (step > 3)
        choice = pipe.pack_choice
        assert choice.packs == pipe.plan.packs
        if trace:
            pipe.trace.save(tmp_path / "trace.json")
            saved = json.loads((tmp_path / "trace.json").read_text())["otherData"]["pack_choice"]
            assert saved == str(choice)
            assert f"K = {choice.packs[0]}" in saved or str(choice.packs) in saved


def test_a_choice_that_is_interrupted_changes_nothing_and_is_made_at_the_next_step(monkeypatch):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(8, 4)
    with (
        imitated_link(LocalLink(overhead=0.002)),
        pe.Pipeline(model, 2, 8, loss_fn=F.mse_loss, pack="auto") as pipe,
    ):
        for _ in range(3):
            pipe.step(x, target=x)
        before = [p.grad.clone() for p in model.parameters()]
        plan, trace = pipe.plan, pipe.trace

        def interrupted(*_):
            raise KeyboardInterrupt

        for name in ("simulate", "fastest"):
            with monkeypatch.context() as patch:
                patch.setattr(pack_choice, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    pipe.step(x, target=x)
            assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), before))
            assert pipe.plan is plan and pipe.trace is trace and pipe.pack_choice is None
        pipe.step(x, target=x)
        assert pipe.trace.pack_choice is pipe.pack_choice is not None
        assert pipe.plan is pipe.trace.plan is pipe.pack_choice.plan


def test_a_pipeline_that_chooses_nothing_has_no_choice():
    with pe.Pipeline([Wait(0.0)] * 2, microbatches=2, loss_fn=F.mse_loss, pack=2) as pipe:
        for _ in range(4):
            pipe.step(torch.randn(2, 4), target=torch.randn(2, 4))
        assert pipe.pack_choice is pipe.trace.pack_choice is None


def test_a_schedule_that_lists_its_sends_stays_as_it_is():
    rows = [["0F0", "0SEND_F0", "0RECV_B0", "0B0"], ["1RECV_F0", "1F0", "1B0", "1SEND_B0"]]
    with pe.Pipeline(
        [Wait(0.0) for _ in range(2)], microbatches=1, schedule=rows, loss_fn=F.mse_loss, pack="auto"
    ) as pipe:
        for _ in range(4):
            pipe.step(torch.randn(2, 4), target=torch.randn(2, 4))
        assert pipe.plan.packs == [1]


def test_only_pipelines_that_are_made_within_it_use_an_imitated_link():
    def seconds(pipe):
        x = torch.randn(4, 4)
        pipe.step(x, target=x)
        return sum(message.seconds for message in pipe.trace.messages)

    def pipeline():
        return pe.Pipeline([Wait(0.0)] * 2, microbatches=2, loss_fn=F.mse_loss)

    with imitated_link(LocalLink(overhead=0.002)):
        within = pipeline()
    with within, pipeline() as after:
        assert seconds(within) >= 4 * 0.002
        assert seconds(after) == 0
