"""in_flight="auto": more microbatches in flight where times vary, within the limit of memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pipeline_ext as pe
from pipeline_ext import _C
from pipeline_ext.cli import main
from pipeline_ext.plan.slots import choose_slots

SCHEDULES = [name for name in _C.schedule_names() if _C.layout_of(name) != "bidirectional"]


def choice(schedule, ranks, microbatches, limit, noise=0.3):
    chunks = {"looped": 2, "v": 2}.get(_C.layout_of(schedule), 1)
    costs = pe.Costs(memory_limit=limit)
    return choose_slots(
        lambda room: pe.build_plan(
            schedule,
            num_stages=ranks * chunks,
            num_ranks=ranks,
            microbatches=microbatches,
            reactive=True,
            room=room,
            memory=costs,
        ),
        costs,
        noise=noise,
    )


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(SCHEDULES), st.sampled_from([2, 4]), st.integers(1, 4), st.floats(1, 4), st.floats(0, 1.0)
)
def test_what_is_chosen_keeps_the_limit_and_is_hardly_longer_than_any_other(
    schedule, ranks, times, more, noise
):
    own = choice(schedule, ranks, times * ranks, 1e9, noise).tried[0]
    limit = more * own.peak_memory
    found = choice(schedule, ranks, times * ranks, limit, noise)
    assert all(slots.peak_memory <= limit for slots in found.tried)
    assert found.chosen.makespan <= 1.005 * min(slots.makespan for slots in found.tried)
    fewer = found.tried[: found.tried.index(found.chosen)]
    assert all(slots.makespan > 1.005 * min(s.makespan for s in found.tried) for slots in fewer)
    assert all(a <= b for x, y in zip(found.tried, found.tried[1:]) for a, b in zip(x.room, y.room))


def test_slots_shorten_a_step_whose_times_vary():
    found = choice("1f1b", 4, 32, 1e9)
    assert found.chosen.makespan < 0.96 * found.tried[0].makespan
    assert choice("1f1b", 4, 32, found.tried[0].peak_memory).tried == found.tried[:1]


def test_a_pipeline_takes_them_and_trains_the_same():
    torch.manual_seed(0)
    stages = [nn.Linear(4, 4) for _ in range(3)]
    x, y = torch.randn(12, 4), torch.randn(12, 4)

    def gradients(**options):
        for stage in stages:
            stage.zero_grad()
        with pe.Pipeline(stages, None, 12, "1f1b", loss_fn=F.mse_loss, **options) as pipe:
            for _ in range(3):
                for stage in stages:
                    stage.zero_grad()
                pipe.step(x, target=y)
            return pipe.plan.limits, [p.grad.clone() for stage in stages for p in stage.parameters()]

    own, expected = gradients()
    found, grads = gradients(in_flight="auto", costs=pe.Costs(act_memory=1.0, memory_limit=8.0))
    assert found[0] > own[0]
    assert all(map(torch.equal, grads, expected))


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "costs have no memory_limit"),
        ({"costs": pe.Costs()}, "costs have no memory_limit"),
        ({"reactive": False}, "reactive is False"),
        ({"schedule": "auto"}, "would choose twice"),
        ({"pack": "auto"}, "would choose twice"),
        ({"in_flight": "all"}, 'or "auto"'),
        ({"costs": pe.Costs(memory_limit=4.0, mem_w=1.0)}, "give act_memory too, or leave them out"),
        ({"schedule": "zb-auto"}, "searches for an order .* before the first step; give act_memory"),
        ({"graphs": True}, "graphs=True captures steps of one plan; give act_memory"),
        ({"costs": pe.Costs(memory_limit=[4.0])}, "memory_limit has 1 entr"),
    ],
)
def test_what_it_does_not_go_with_is_refused(options, said):
    given = {"in_flight": "auto", "costs": pe.Costs(memory_limit=4.0), "schedule": "1f1b", **options}
    if not options:
        del given["costs"]
    with pytest.raises(pe.InvalidArgument, match=said):
        pe.Pipeline([nn.Linear(2, 2)] * 2, None, 4, loss_fn=F.mse_loss, **given)


def test_plan_shows_what_more_slots_bring(capsys):
    command = ["plan", "--schedule", "1f1b,dualpipe", "--ranks", "4", "--microbatches", "16", "--noise", "0.3"]
    assert main([*command, "--memory-limit", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (title,) = [i for i, line in enumerate(lines) if "times that vary by 0.3" in line]
    assert lines[title].startswith("1f1b, ")
    slots = [int(line.split()[0]) for line in lines[title + 1 :]]
    assert slots[0] == 4 and max(slots) <= 8 and sum("<- chosen" in line for line in lines) == 1
    with pytest.raises(SystemExit):
        main([*command[:-1], "-1"])
    assert "'-1' is not a coefficient of variation, from 0 to 1000" in capsys.readouterr().err
