"""What a pipeline is told of costs and memory: what it searches for, what it keeps, and what it refuses."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext.plan import schedule_choice, zero_bubble

COSTS = pe.Costs(act_memory=[1.0, 2.0, 1.0, 1.0], mem_i=[0.5, 1.0, 0.0, 0.0], memory_limit=[3, 4, 3, 2])


pytestmark = pytest.mark.usefixtures("short_searches")


@pytest.fixture(autouse=True)
def chooses_by_count(monkeypatch):
    monkeypatch.setattr(schedule_choice, "_SECONDS", None)
    monkeypatch.setattr(schedule_choice, "_TRIALS", 50)
    monkeypatch.setattr(schedule_choice, "_WORTH", float("inf"))


def stages(count):
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(count)))


def pipeline(schedule, count=4, microbatches=6, **settings):
    return pe.Pipeline(stages(count), count, microbatches, schedule, F.mse_loss, **settings)


def steps(pipe, count):
    """Trains; the gradients of each step are the reference's."""
    x, y = torch.randn(2, 2 * pipe.microbatches, 4)
    model = nn.Sequential(*pipe.stage_modules)
    for _ in range(count):
        model.zero_grad()
        plain = twin(model)
        pipe.step(x, target=y)
        reference_step(plain, x, y, pipe.microbatches, F.mse_loss)
        assert_same_gradients(model, gradients(plain))


def within(plan, costs):
    """Whether each rank holds no more than it may, by a simulation that does not see to it."""
    held = pe.simulate(plan, replace(costs, memory_limit=None)).peak_memory
    return all(peak <= limit * (1 + 1e-9) for peak, limit in zip(held, costs.memory_limit))


def static(plan):
    """The order of a plan, kept."""
    return pe.build_plan(plan.order(), num_stages=plan.num_stages, microbatches=plan.num_microbatches)


@pytest.mark.parametrize("reactive", [False, True])
@pytest.mark.parametrize("ranks, in_flight", [(4, 2), (4, [4, 3, 2, 1]), (2, 2), (2, [4, 3, 2, 1])])
def test_zb_auto_is_searched_for_within_the_microbatches_in_flight(ranks, in_flight, reactive):
    with pipeline("zb-auto", devices=["cpu"] * ranks, in_flight=in_flight, reactive=reactive) as pipe:
        most = in_flight if isinstance(in_flight, list) else [in_flight] * 4
        assert all(limit <= allowed for limit, allowed in zip(pipe.plan.limits, most))
        assert pipe.plan.kinds() == ["F", "I", "W"]
        steps(pipe, 2)
        assert all(peak <= allowed for peak, allowed in zip(pipe.trace.peak_in_flight_of_stage, most))


@pytest.mark.parametrize("reactive", [False, True])
def test_zb_auto_is_searched_for_within_the_memory(reactive):
    with pipeline("zb-auto", reactive=reactive) as pipe:
        assert not within(pipe.plan, COSTS)
    with pipeline("zb-auto", reactive=reactive, costs=COSTS) as pipe:
        assert within(static(pipe.plan), COSTS)
        steps(pipe, 2)


def test_zb_auto_suits_the_times_given():
    dear_links = pe.Costs(latency=2.0)
    with pipeline("zb-auto") as other, pipeline("zb-auto", costs=dear_links) as suited:
        theirs, ours = (pe.simulate(static(pipe.plan), dear_links).makespan for pipe in (other, suited))
        assert ours < theirs


def test_zb_auto_is_searched_for_once(monkeypatch):
    searches = []
    find_order = zero_bubble.find_order
    monkeypatch.setattr(
        zero_bubble, "find_order", lambda *args, **settings: searches.append(1) or find_order(*args, **settings)
    )
    with pipeline("zb-auto", pack="auto") as pipe:
        steps(pipe, 5)
        assert pipe.pack_choice is not None
    assert len(searches) == 1


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved-1f1b", "zbv"])
def test_any_schedule_keeps_the_memory_or_is_refused_with_the_cell_that_exceeds_it(schedule):
    needed = pe.simulate(pe.build_plan(schedule, num_stages=4, microbatches=6)).peak_memory
    with pipeline(schedule, costs=pe.Costs(memory_limit=needed)) as pipe:
        steps(pipe, 2)
    for rank in range(len(needed)):
        limit = [held - (r == rank) for r, held in enumerate(needed)]
        with pytest.raises(pe.InvalidSchedule) as refused:
            pipeline(schedule, costs=pe.Costs(memory_limit=limit))
        said = f"the rank would hold {needed[rank]:g} of memory, its limit is {limit[rank]:g}; allow more"
        assert str(refused.value).startswith(f"rank {rank}, cell ") and said in str(refused.value)
        assert f"<-- ERROR HERE (rank {rank})" in str(refused.value)


@pytest.mark.parametrize("reactive", [False, True])
def test_what_is_chosen_keeps_the_memory_too(reactive):
    costs = pe.Costs(act_memory=[1.0, 2.0, 1.5, 1.0], mem_i=0.5, memory_limit=[4.0, 6.0, 3.0, 2.0])
    with pipeline("auto", costs=costs, reactive=reactive) as pipe:
        steps(pipe, 5)
        assert pipe.plan is pipe.schedule_choice.plan
        assert within(static(pipe.plan), costs)


@pytest.mark.parametrize(
    "costs, message",
    [
        (3, "costs is 3; give a Costs"),
        (pe.Costs(forward=[1.0, 2.0]), "forward has 2 entries; .* or one for each of the 4 stages"),
        (pe.Costs(memory_limit=[1.0, 2.0]), "memory_limit has 2 entries"),
        (pe.Costs(memory_limit=0.5), "rank 0 may hold 0.5|the rank would hold 1 of memory, its limit is 0.5"),
        (pe.Costs(mem_i=2.0), "mem_i 2 and mem_w 0 free more than the act_memory 1"),
        (
            pe.Costs(microbatch=[1.0, 2.0]),
            "microbatch has factors for 2 microbatches; give one for each of the 6",
        ),
    ],
)
@pytest.mark.parametrize("schedule", ["zb-auto", "auto", "1f1b", "zb-h1"])
def test_costs_that_do_not_fit_are_refused(schedule, costs, message):
    with pytest.raises(pe.InvalidArgument, match=message):
        pipeline(schedule, costs=costs)


# -- plans that cannot run


NEVER_ENDS = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
CYCLE = """these tasks wait for one another
  rank 0, cell 1 '0B0' waits for rank 1, cell 2 '1B0'
  rank 1, cell 2 '1B0' stands behind rank 1, cell 1 '1F1'
  rank 1, cell 1 '1F1' waits for rank 0, cell 2 '0F1'
  rank 0, cell 2 '0F1' stands behind rank 0, cell 1 '0B0'
"""
REFUSED = {
    "a cycle": (NEVER_ENDS, CYCLE),
    "a pair in a cycle": (
        [["0F0", "(0B0;0F1)OVERLAP_F_B", "0B1"], NEVER_ENDS[1]],
        "rank 0, cell 1 '0B0' waits for rank 1, cell 2 '1B0'",
    ),
    "too much memory": ("gpipe", "rank 0, cell 1 '0F1': the rank would hold 2 of memory, its limit is 1"),
    "no such microbatch": (
        [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1B0", "1B1"]],
        "rank 1, cell 2 '1B1': stage 1 has no F for microbatch 1",
    ),
    "no such stage": (
        [["0F0", "0B0", "0F1", "0B1"], ["2F0", "2B0", "2F1", "2B1"]],
        "rank 1, cell 0 '2F0': stage 1 appears nowhere",
    ),
    "no W": (
        [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1I0", "1F1", "1I1", "1W1"]],
        "rank 1, cell 1 '1I0': stage 1 has no W for microbatch 0",
    ),
    "no receiver": (
        [["0F0", "0SEND_F0", "0F1", "0B0", "0B1"], ["1F0", "1F1", "1B0", "1B1"]],
        "rank 0, cell 1 '0SEND_F0': its partner 1RECV_F0 appears nowhere",
    ),
    "another rank's stage": (
        [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1B0", "1F1", "1B1", "0F1"]],
        "rank 1, cell 4 '0F1': stage 0 is already on rank 0",
    ),
    "two copies": ("dualpipe", "two copies of each stage's parameters, which can be planned and simulated but"),
}


@pytest.mark.parametrize("schedule, message", REFUSED.values(), ids=REFUSED)
def test_a_plan_that_cannot_run_is_refused_before_anything_does(schedule, message, tmp_path):
    if isinstance(schedule, list):
        path = tmp_path / "schedule.csv"
        path.write_text("".join(",".join(row) + "\n" for row in schedule))
        schedule = path
    model, ran = stages(2), []
    for stage in model:
        stage.register_forward_pre_hook(lambda *_: ran.append(1))
    before = [p.clone() for p in model.parameters()]
    costs = pe.Costs(memory_limit=1) if schedule == "gpipe" else None
    with pytest.raises(pe.InvalidSchedule) as refused:
        pe.Pipeline(model, 2, 2, schedule, F.mse_loss, reactive=False, costs=costs)
    assert message in str(refused.value)
    assert not ran and all(map(torch.equal, model.parameters(), before))
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss) as pipe:  # and the model is as good as before
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))


# -- ranks by default


@pytest.mark.parametrize(
    "schedule, placed",
    [
        *((name, [0, 1, 2, 3]) for name in ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-auto", "auto")),
        *((name, [0, 1, 0, 1]) for name in ("interleaved-1f1b", "looped-bfs")),
        *((name, [0, 1, 1, 0]) for name in ("zbv", "v-half", "v-min", "dualpipev")),
    ],
)
def test_by_default_a_schedule_has_as_many_ranks_as_it_is_for(schedule, placed):
    with pipeline(schedule) as pipe:
        assert pipe.plan.rank_of_stage == placed
        assert pipe.devices == [torch.device("cpu")] * pipe.plan.num_ranks


@pytest.mark.parametrize("schedule", ["zb-auto", "auto"])
def test_half_as_many_devices_as_stages_place_them_in_a_v(schedule):
    with pipeline(schedule, devices=["cpu"] * 2) as pipe:
        assert pipe.plan.rank_of_stage == [0, 1, 1, 0]
