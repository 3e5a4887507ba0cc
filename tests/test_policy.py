"""Schedules of the user's own, in Python."""

import pytest
import textbook
import torch
import torch.nn.functional as F
from models import chain
from reference import assert_same_gradients, gradients, reference_step, twin

import pipeline_ext as pe


def one_f_one_b_order(placement, rank, microbatches):
    return textbook.one_f_one_b(rank, placement.num_ranks, microbatches)


def backward_first(rank, ready):
    return max(ready, key=lambda action: "B" in action)


BUILD = {
    "order": pe.Policy(order=one_f_one_b_order),
    "rule": pe.Policy(preference=("B", "F"), limit=lambda placement, stage, m: placement.num_stages - stage),
}


@pytest.mark.parametrize("way", BUILD)
def test_1f1b_written_as_a_policy_is_1f1b(way):
    for stages in range(1, 6):
        for microbatches in range(1, 9):
            shape = {"num_stages": stages, "microbatches": microbatches}
            assert pe.build_plan(BUILD[way], **shape).order() == pe.build_plan("1f1b", **shape).order()


@pytest.mark.parametrize("policy", [*BUILD.values(), pe.Policy(choose=backward_first)])
@pytest.mark.parametrize("reactive", [False, True])
def test_a_policy_trains_as_plain_autograd(policy, reactive):
    model, x, y = chain(), torch.randn(9, 12), torch.randn(9, 12)
    plain = twin(model)
    reference_step(plain, x, y, 5, F.mse_loss)
    with pe.Pipeline(model, 3, 5, policy, F.mse_loss, reactive=reactive) as pipe:
        pipe.step(x, target=y)
        if not reactive:
            assert pipe.trace.order() == pipe.plan.order()
    assert_same_gradients(model, gradients(plain))


@pytest.mark.parametrize("placement, stages, ranks", [("linear", 3, 3), ("looped", 6, 2), ("v", 6, 3)])
@pytest.mark.parametrize("split", [False, True])
def test_choose_is_asked_about_what_is_ready_on_each_rank(placement, stages, ranks, split):
    seen = []

    def latest(rank, ready):
        seen.append((rank, ready))
        return ready[-1]

    policy = pe.Policy(placement, choose=latest, split=split)
    plan = pe.build_plan(policy, num_stages=stages, num_ranks=ranks, microbatches=4)
    assert len(plan) == stages * 4 * (3 if split else 2) == len(seen)
    for rank, ready in seen:
        assert all(plan.rank_of_stage[int(action[0])] == rank for action in ready)
    assert pe.simulate(plan).makespan > 0


def test_choose_may_wait_while_something_else_runs():
    def one_at_a_time(rank, ready):
        """The second microbatch enters once the first has come back."""
        backward = [action for action in ready if "B" in action]
        return backward[0] if backward else ready[0] if not held[rank] else None

    held = {0: False, 1: False}

    def choose(rank, ready):
        action = one_at_a_time(rank, ready)
        if action:
            held[rank] = "F" in action
        return action

    plan = pe.build_plan(pe.Policy(choose=choose), num_stages=2, microbatches=2)
    assert plan.order() == {0: ["0F0", "0B0", "0F1", "0B1"], 1: ["1F0", "1B0", "1F1", "1B1"]}


def test_a_rule_may_split_the_backward():
    policy = pe.Policy(preference=("I", "F", "W"), limit=lambda placement, stage, m: 3)
    plan = pe.build_plan(policy, num_stages=3, microbatches=8)
    assert plan.kinds() == ["F", "I", "W"]
    assert max(pe.simulate(plan).peak_in_flight_of_stage) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"choose": lambda rank, ready: "7F7"}, r"chose '7F7' for rank 0; choose one of \['0F0'\], or None"),
        ({"choose": lambda rank, ready: None}, r"chose None for rank 0 with \['0F0'\] ready"),
        ({"order": lambda placement, rank, m: 3}, r"order for rank 0 is \[3\]; return a list of actions"),
        ({"order": lambda placement, rank, m: ["0F0", "0B0", "1F0", "1B0"][2 * rank :]}, "already on rank 0"),
        ({"order": lambda placement, rank, m: [f"{1 - rank}F0", f"{1 - rank}B0"]},
         "order for rank 1 lists stage 0, which its placement 'linear' has on rank 0"),
        ({"preference": ("B", "F"), "limit": lambda placement, stage, m: 0}, "limit for stage 0 is 0"),
    ],
)  # fmt: skip
def test_what_a_policy_returns_is_checked(options, message):
    with pytest.raises(pe.InvalidArgument, match=message):
        pe.build_plan(pe.Policy(**options), num_stages=2, microbatches=1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"placement": "w"}, "placement is 'w'; give one of linear, looped, v"),
        ({}, "one of order=, limit= with preference=, and choose="),
        ({"choose": max, "order": max}, "one of order=, limit= with preference=, and choose="),
        ({"choose": 3}, "choose is 3; give a function"),
        ({"limit": max}, r"preference is \(\); with limit= give B and F"),
        ({"limit": max, "preference": ("B", "W")}, "with limit= give B and F"),
    ],
)
def test_a_policy_says_one_thing(options, message):
    with pytest.raises(pe.InvalidArgument, match=message):
        pe.Policy(**options)
