"""Every schedule as the engine runs it: plain autograd's gradients, and what its plan says holds in time."""

import math
import random
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from random_orders import is_sorted, needs, orders, parse
from random_runs import WIDTH, Dawdling
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext import _C
from pipeline_ext.plan import schedule_choice
from pipeline_ext.plan.build import layout_of

pytestmark = pytest.mark.usefixtures("short_searches")


# -- models, of so many stages


def perceptron(stages):
    return nn.Sequential(
        *(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)) for _ in range(stages))
    )


def tied(stages):
    """The first and the last stage hold one weight."""
    model = perceptron(stages)
    model[-1][1].weight = model[0][1].weight
    return model


def transformer(stages):
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, 0.0, batch_first=True) for _ in range(stages))
    )


def frozen(stages):
    """Nothing of the first stage is trained."""
    model = perceptron(stages + (stages == 1))
    model[0].requires_grad_(False)
    return model if stages > 1 else nn.Sequential(model)


MODELS = [perceptron, tied, transformer, frozen]


def batch(make, microbatches):
    shape = (2 * microbatches + microbatches // 2, *[3] * (make is transformer), WIDTH)
    return torch.randn(shape), torch.randn(shape)


# -- schedules


def steady_pairs(rank, ranks, microbatches):
    """1F1B, in which all ranks but the last run a forward and a backward as one."""
    ahead = min(ranks - rank - 1, microbatches)
    joined = "({};{})OVERLAP_F_B" if ahead else "{} {}"
    row = [f"{rank}F{m}" for m in range(ahead)]
    for m in range(microbatches - ahead):
        row += joined.format(f"{rank}F{ahead + m}", f"{rank}B{m}").split()
    return row + [f"{rank}B{m}" for m in range(microbatches - ahead, microbatches)]


def later_first(rank, ready):
    """Of what is ready the last stage's, and rather an I or a B than another."""
    return max(ready, key=lambda action: ("I" in action or "B" in action, int(parse(action)[0][0])))


POLICIES = {
    "policy order": pe.Policy(order=lambda placement, rank, m: steady_pairs(rank, placement.num_ranks, m)),
    "policy rule": pe.Policy(preference=("I", "F", "W"), limit=lambda placement, stage, m: 3),
    "policy rule, v": pe.Policy("v", preference=("B", "F"), limit=lambda placement, stage, m: m),
    "policy choose": pe.Policy(choose=later_first),
    "policy choose, looped": pe.Policy("looped", choose=later_first, split=True),
}
SCHEDULES = [name for name in pe.schedule_names() if name != "dualpipe"]
SCHEDULES += ["zb-auto, v", "csv", *POLICIES]
GIVEN = [name for name in SCHEDULES if name not in _C.schedule_names() and "rule" not in name]  # orders, listed


def stages_of(name, ranks):
    """So many stages has a schedule here."""
    if name in POLICIES:
        return ranks * (1 if POLICIES[name].placement == "linear" else 2)
    looped = name.endswith(", v") or (name != "csv" and layout_of(name, 1, 1) in ("looped", "v"))
    return 2 * ranks if looped else ranks


def schedule_of(name, ranks, microbatches, folder):
    """What to give a pipeline."""
    if name == "csv":
        path = folder / f"{ranks}-{microbatches}.csv"
        rows = [",".join(steady_pairs(rank, ranks, microbatches)) for rank in range(ranks)]
        path.write_text("\n".join(rows) + "\n")
        return path
    return POLICIES.get(name, name.removesuffix(", v"))


def counts(ranks):
    """Microbatches: one, fewer than ranks, no multiple of them, twice as many."""
    return sorted({1, max(1, ranks - 1), ranks + 1, 2 * ranks})


# -- what must hold of a step


def most_held(records, change):
    """The most that is held, by what ``change(record)`` takes at its begin and frees at its end."""
    found = []
    for record in records:
        taken, freed = change(record)
        found += [(record.begin, 1, taken), (record.end, 0, -freed)]
    held = peak = 0.0
    for _, _, amount in sorted(found):
        held += amount
        peak = max(peak, held)
    return peak


def check_in_time(pipe, costs=None):
    """Dependencies, the order of microbatches, streams, and the limits of slots and of memory."""
    plan, records = pipe.plan, [r for r in pipe.trace.tasks if r.kind in "FBIW"]
    at = {(r.stage, r.kind, r.microbatch): r for r in records}
    assert len(at) == len(records) == len(plan)
    for task, record in at.items():
        split = (task[0] + 1, "I", task[2]) in at
        assert all(at[before].end <= record.begin for before in needs(task, plan.num_stages, split))
    by_kind, by_stream = defaultdict(list), defaultdict(list)
    for record in records:
        by_kind[record.stage, record.kind].append(record.microbatch)
        by_stream[record.rank, record.stream if plan.overlap else ""].append(record)
    assert all(is_sorted(microbatches) for microbatches in by_kind.values())
    for ran in by_stream.values():
        assert all(before.end <= after.begin for before, after in pairwise(ran))
    for stage, limit in enumerate(plan.limits):
        of_stage = [r for r in records if r.stage == stage]
        assert most_held(of_stage, lambda r: (r.kind == "F", r.kind in "BW")) <= limit
    if costs is not None:
        for rank, limit in enumerate(costs.memory_limit):
            of_rank = [r for r in records if r.rank == rank]
            assert most_held(of_rank, lambda r: memory_of(r, costs)) <= limit * (1 + 1e-9)


def memory_of(record, costs):
    """What a task takes and frees."""
    taken, by_i = costs.act_memory[record.stage], costs.mem_i[record.stage]
    return {"F": (taken, 0.0), "B": (0.0, taken), "I": (0.0, by_i), "W": (0.0, taken - by_i)}[record.kind]


def check_order(pipe):
    """All tasks began as planned: each rank's, or where it has two streams each stream's."""
    ran, planned = defaultdict(list), defaultdict(list)
    for r in pipe.trace.tasks:
        ran[r.rank, r.stream if pipe.plan.overlap else ""].append((r.stage, r.kind, r.microbatch))
    for rank, cells in pipe.plan.order().items():
        for task in (task for cell in cells for task in parse(cell)):
            stream = ("forward" if task[1] == "F" else "backward") if pipe.plan.overlap else ""
            planned[rank, stream].append(task)
    assert ran == planned


def check_gradients(make, model, expected):
    if make is tied and len(model) > 1:  # the sum over stages is rounded in another order
        found = gradients(model)
        shared = next(iter(p for p in found if p.startswith("0.") and p.endswith("weight")))
        torch.testing.assert_close(found[shared], expected[shared])
        expected = {**expected, shared: found[shared]}
    assert_same_gradients(model, expected)


def reference(make, stages, microbatches):
    """A model, a batch, and the gradients and the loss that are expected."""
    model, (x, y) = make(stages), batch(make, microbatches)
    plain = twin(model)
    loss = reference_step(plain, x, y, microbatches, F.mse_loss)
    return model, x, y, gradients(plain), loss


MODES = [{"reactive": r, "overlap": o} for r, o in product((False, True), repeat=2)]
FEW_MODES = [MODES[0], MODES[3]]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_are_the_reference_s_and_the_order_is_the_planned_one(name, ranks, tmp_path):
    stages = stages_of(name, ranks)
    for microbatches in counts(ranks):
        schedule = schedule_of(name, ranks, microbatches, tmp_path)
        for make in MODELS:
            model, x, y, expected, loss = reference(make, stages, microbatches)
            for mode in MODES if make is perceptron else FEW_MODES:
                model.zero_grad()
                with pe.Pipeline(
                    model, stages, microbatches, schedule, F.mse_loss, devices=["cpu"] * ranks, **mode
                ) as pipe:
                    assert torch.equal(pipe.step(x, target=y), loss)
                    check_gradients(make, model, expected)
                    check_in_time(pipe)
                    if not mode["reactive"]:
                        check_order(pipe)


@pytest.mark.parametrize("ranks, chunks", [(1, 1), (2, 1), (4, 1), (2, 2), (2, 3)])
def test_so_are_those_of_a_schedule_that_is_chosen(ranks, chunks, monkeypatch):
    monkeypatch.setattr(schedule_choice, "_SECONDS", None)  # the search ends by count
    monkeypatch.setattr(schedule_choice, "_TRIALS", 50)
    monkeypatch.setattr(schedule_choice, "_WORTH", math.inf)  # so that it does change
    for microbatches, mode in zip(counts(ranks), MODES):
        model, x, y, expected, loss = reference(perceptron, ranks * chunks, microbatches)
        with pe.Pipeline(
            model, ranks * chunks, microbatches, "auto", F.mse_loss, devices=["cpu"] * ranks, **mode
        ) as pipe:
            for _ in range(5):
                model.zero_grad()
                assert torch.equal(pipe.step(x, target=y), loss)
                assert_same_gradients(model, expected)
                check_in_time(pipe)
                if not mode["reactive"]:
                    check_order(pipe)
            assert pipe.plan is pipe.schedule_choice.plan


@pytest.mark.parametrize("name", SCHEDULES)
def test_results_leave_in_packs_of_any_size(name, tmp_path):
    ranks, microbatches = 3, 5
    stages, schedule = stages_of(name, ranks), schedule_of(name, ranks, microbatches, tmp_path)
    model, x, y, expected, loss = reference(perceptron, stages, microbatches)
    for reactive, pack, pack_forward in product((False, True), (2, "all"), (1, 2, "all")):
        model.zero_grad()
        try:
            pipe = pe.Pipeline(
                model, stages, microbatches, schedule, F.mse_loss, devices=["cpu"] * ranks,
                reactive=reactive, pack=pack, pack_forward=pack_forward,
            )  # fmt: skip
        except pe.InvalidSchedule as refused:
            assert not reactive and name in GIVEN
            assert "results that leave together wait for one another" in str(refused)
            continue
        with pipe:
            assert torch.equal(pipe.step(x, target=y), loss)
            assert_same_gradients(model, expected)
            check_in_time(pipe)
            if not reactive:
                check_order(pipe)


@pytest.mark.parametrize("name", SCHEDULES)
def test_on_gpus_gradients_are_the_reference_s_too(name, gpus, tmp_path):
    ranks, microbatches = 2, 5
    stages, schedule = stages_of(name, ranks), schedule_of(name, ranks, microbatches, tmp_path)
    model, x, y, expected, loss = reference(perceptron, stages, microbatches)
    for devices, mode in zip((["cuda:0"] * 2, ["cuda:0", "cuda:1"]) * 2, MODES):
        with pe.Pipeline(model, stages, microbatches, schedule, F.mse_loss, devices=devices, **mode) as pipe:
            for _ in range(2):
                model.zero_grad()
                assert torch.equal(pipe.step(x, target=y), loss)
                assert_same_gradients(model, expected)


@st.composite
def orders_to_run(draw):
    """Rows of cells, by rank: of a schedule, or at random."""
    if draw(st.booleans()):
        return draw(orders(ascending=True))
    name, ranks = draw(st.sampled_from([name for name in SCHEDULES if name != "csv"])), draw(st.integers(1, 3))
    plan = pe.build_plan(
        schedule_of(name, ranks, 0, None),
        num_stages=stages_of(name, ranks),
        num_ranks=ranks,
        microbatches=draw(st.integers(1, 6)),
    )
    return list(plan.order().values())


@settings(max_examples=100, deadline=None)
@given(orders_to_run(), st.booleans(), st.booleans(), st.data())
def test_whatever_the_times_of_tasks_ranks_that_react_keep_all_limits(rows, overlap, limited, data):
    tasks = [task for row in rows for cell in row for task in parse(cell)]
    stages, microbatches = (1 + max(task[i] for task in tasks) for i in (0, 2))
    taken = data.draw(st.lists(st.floats(0.5, 3.0), min_size=stages, max_size=stages))
    share = data.draw(st.floats(0.0, 1.0))
    costs = pe.Costs(act_memory=taken, mem_i=[share * t for t in taken])
    planned = pe.build_plan(rows, num_stages=stages, microbatches=microbatches)
    costs = replace(costs, memory_limit=pe.simulate(planned, costs).peak_memory) if limited else None
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    model, x, y, expected, loss = reference(
        lambda stages: nn.Sequential(*(Dawdling(chance, [], []) for _ in range(stages))), stages, microbatches
    )
    with pe.Pipeline(
        model, stages, microbatches, rows, F.mse_loss, devices=["cpu"] * len(rows), overlap=overlap, costs=costs
    ) as pipe:
        assert torch.equal(pipe.step(x, target=y), loss)
        assert_same_gradients(model, expected)
        check_in_time(pipe, costs)
        assert not pipe.unsplit_stages
