"""What "auto" chooses over processes: one plan for all, and plain autograd's gradients before and after."""

import contextlib
import io
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from random_runs import WIDTH, Dawdling
from reference import reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext.plan import drift as drift_module
from pipeline_ext.plan import pack_choice, schedule_choice

STEPS, MICROBATCHES = 5, 8


def model(stages, skips):
    ends = {0: (["skip"], []), stages - 1: ([], ["skip"])} if skips else {}
    return nn.Sequential(*(Dawdling(None, *ends.get(stage, ([], []))) for stage in range(stages)))


def change():
    """Sees to it that the last plan tried is taken, an order that is not that of the first steps."""
    makespans = itertools.count(1000, -1)
    schedule_choice.simulate = lambda *given: SimpleNamespace(
        makespan=next(makespans), peak_in_flight=pe.simulate(*given).peak_in_flight
    )
    schedule_choice.search = find
    pack_choice._WORTH = schedule_choice._WORTH = math.inf


def find(costs, *, num_ranks, chunks, microbatches, schedules, **_):
    name = "zb-h1" if "zb-h1" in schedules else "v-half"
    plan = pe.build_plan(name, num_stages=num_ranks * chunks[0], num_ranks=num_ranks, microbatches=microbatches)
    return SimpleNamespace(
        interrupted=False, simulations=1, best=SimpleNamespace(schedule="zb-auto", plan=plan)
    )


def train(stages, dp, skips, options):
    """Trains past the choice; returns the plans before and after, and what was said."""
    change()
    mesh = dist.init_device_mesh("cpu", (dp, 2), mesh_dim_names=("dp", "pp"))
    trained = model(stages, skips)
    plain = twin(trained)
    said = io.StringIO()
    with pe.Pipeline(
        trained, stages, MICROBATCHES, loss_fn=F.mse_loss, mesh=mesh, timeout=20, **options
    ) as pipe:
        before = describe(pipe.plan)
        for step in range(STEPS):
            x, y = torch.randn(2, 10 * dp, WIDTH)
            mine = [part.chunk(dp)[mesh.get_local_rank("dp")] for part in (x, y)]
            with contextlib.redirect_stdout(said):
                pipe.step(mine[0], target=mine[1])
            chosen = pipe.pack_choice or pipe.schedule_choice
            assert (chosen is not None) == (step > 2)
            if dp == 1:
                reference_step(plain, x, y, MICROBATCHES, F.mse_loss)
            else:
                F.mse_loss(plain(x), y).backward()
            for name, p in pipe.named_parameters():
                expected = plain.get_parameter(name).grad
                assert torch.equal(p.grad, expected) if dp == 1 else torch.allclose(p.grad, expected, atol=1e-6)
        assert pipe.plan is chosen.plan
        return before, describe(pipe.plan), str(chosen), said.getvalue()


def describe(plan):
    return plan.to_csv(), plan.packs, plan.packs_forward, plan.limits


@pytest.mark.parametrize(
    "stages, dp, skips, options",
    [
        (2, 1, False, {"pack": "auto"}),
        (4, 1, True, {"pack": "auto", "pack_forward": "auto", "schedule": "interleaved-1f1b"}),
        (2, 1, False, {"schedule": "auto"}),
        (4, 1, True, {"schedule": "auto", "pack": 2}),
        (2, 2, False, {"schedule": "auto", "in_flight": 3}),
    ],
)
def test_all_processes_follow_what_one_chooses(stages, dp, skips, options):
    (before, after, chosen, said), *others = run(2 * dp, train, stages, dp, skips, options)
    assert before != after
    assert said == f"{chosen}\n"
    assert others == [(before, after, chosen, "")] * (2 * dp - 1)


def fail_to_choose():
    trained = model(2, False)
    with pe.Pipeline(trained, 2, MICROBATCHES, "auto", F.mse_loss, mesh=dist.group.WORLD, timeout=20) as pipe:
        x, y = torch.randn(2, 10, WIDTH)
        for _ in range(3):
            pipe.step(x, target=y)
        schedule_choice.search = interrupted
        with pytest.raises(KeyboardInterrupt if dist.get_rank() == 0 else pe.PeerError) as failed:
            pipe.step(x, target=y)
        change()
        assert pipe.schedule_choice is None
        pipe.step(x, target=y)
        assert pipe.schedule_choice is not None
        return str(failed.value)


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_where_one_is_interrupted_nothing_is_chosen_and_all_can_try_again():
    _, told = run(2, fail_to_choose)
    assert told == "rank 0 (process 0) could not choose a plan: KeyboardInterrupt: "


def drift(dp):
    """Trains past two choices; returns the steps at which a choice is there, and what was said."""
    change()
    drift_module.STEPS = 4
    chooses = dist.get_rank() == 0
    mesh = dist.init_device_mesh("cpu", (dp, 2), mesh_dim_names=("dp", "pp"))
    said, chosen = io.StringIO(), []
    with pe.Pipeline(model(2, False), 2, MICROBATCHES, "auto", F.mse_loss, mesh=mesh, timeout=20) as pipe:
        watched = pipe._first_steps
        x, y = torch.randn(2, 10, WIDTH)
        for step in range(20):
            with contextlib.redirect_stdout(said):
                pipe.step(x, target=y)
            chosen.append(pipe.schedule_choice is not None)
            if watched._drift._seconds:  # what the process that chooses has measured counts alone
                promised = pipe.schedule_choice.predicted
                watched._drift._seconds[-1] = promised * (1.0 if not chooses or step < 8 else 1.5)
                if not chooses:
                    watched._drift._seconds[-1] *= 1 + step
        return chosen, said.getvalue(), describe(pipe.plan)


@pytest.mark.parametrize("dp", [1, 2])
def test_all_processes_choose_anew_at_the_step_at_which_one_sees_a_change(dp):
    (chosen, said, plan), *others = run(2 * dp, drift, dp)
    # The looks are as steps 7 and 11 begin, counted from 0: at what 3 to 6 took, and at what 7 to 10 took.
    assert chosen == [False] * 3 + [True] * 8 + [False] * 3 + [True] * 6
    first, changed, second = said.splitlines()
    assert "50% more than the" in changed and "chosen anew" in changed
    assert all(line.startswith('schedule="auto": ') for line in (first, changed, second))
    assert others == [(chosen, "", plan)] * (2 * dp - 1)
