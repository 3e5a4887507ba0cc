"""One trace of a step that several processes have run, in one clock."""

import json
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Failed, Gone, die, freeze, outcomes, run
from torch import nn

import pipeline_ext as pe
from pipeline_ext.processes import clocks

MICROBATCHES = 4
NAP = 0.02  # seconds; much more than clocks can seem apart that are compared over loopback


class Slow(nn.Module):
    """Takes ``NAP`` forward, and again backward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        time.sleep(NAP)
        y = self.inner(x)
        if y.requires_grad:
            y.register_hook(lambda _: time.sleep(NAP))
        return y


def pipeline(stages, schedule="1f1b", mesh=None, timeout=20):
    """One that has taken two steps."""
    pipe = pe.Pipeline(
        [Slow() for _ in range(stages)],
        None,
        MICROBATCHES,
        schedule,
        F.mse_loss,
        mesh=mesh or dist.group.WORLD,
        reactive=False,
        timeout=timeout,
    )
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    for _ in range(2):
        pipe.step(x, target=y)
    return pipe


def check_times(trace):
    """Nothing began before what it waited for had been at work."""
    tasks = {record.task: record for record in trace.tasks}
    assert sorted(tasks) == list(range(len(trace.plan)))
    for task, before in tasks.items():
        assert 0 <= before.begin <= before.end <= trace.step_time
        for after in trace.plan.successors(task):
            if before.kind in "FB" and tasks[after].rank != before.rank:
                assert tasks[after].begin - before.begin > NAP / 2, (before, tasks[after])


def gather(stages, schedule, folder):
    with pipeline(stages, schedule) as pipe:
        trace = pipe.gather_trace()
        if dist.get_rank() > 0:
            return trace
        check_times(trace)
        assert len(trace.tasks) == len(trace.plan) and trace.order() == trace.plan.order()
        crossings = sum(a != b for a, b in zip(trace.plan.rank_of_stage, trace.plan.rank_of_stage[1:]))
        assert [m.count for m in trace.messages] == [MICROBATCHES] * 2 * crossings
        assert all(seconds > NAP / 2 for seconds in trace.profile().forward)
        for name in ("trace.json", "timeline.png"):
            trace.save(folder / name)
        return trace.peak_in_flight, trace.bubble_by_rank


@pytest.mark.parametrize(
    "size, stages, schedule, peaks", [(2, 2, "1f1b", [2, 1]), (3, 3, "gpipe", [4] * 3), (2, 4, "zbv", [4, 4])]
)
def test_it_holds_every_task_of_the_plan_in_the_planned_order(tmp_path, size, stages, schedule, peaks):
    first, *others = run(size, gather, stages, schedule, tmp_path)
    assert others == [None] * (size - 1)
    peak_in_flight, bubbles = first
    assert peak_in_flight == peaks
    assert all(0 < bubble < 1 for bubble in bubbles)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == set(range(size))
    assert (tmp_path / "timeline.png").stat().st_size > 0


def gather_with_other_clocks(skews):
    """As on machines whose clocks show other times."""
    skew = skews[dist.get_rank()]
    with pipeline(2) as pipe:
        record = pipe.trace.record
        shown = SimpleNamespace(
            begin=record.begin + skew,
            end=record.end + skew,
            task_begin=[time and time + skew for time in record.task_begin],
            task_end=[time and time + skew for time in record.task_end],
            peak_by_rank=record.peak_by_rank,
            peak_by_stage=record.peak_by_stage,
        )
        pipe._stepper.trace = pe.Trace(pipe.plan, shown, pipe.trace.messages)
        clocks.now = lambda: time.monotonic_ns() + skew
        trace = pipe.gather_trace()
        if trace is not None:
            check_times(trace)


@pytest.mark.parametrize("skews", [(0, 3600 * 10**9), (3600 * 10**9, 0)])
def test_clocks_that_show_other_times_are_aligned(skews):
    run(2, gather_with_other_clocks, skews)


def gather_reductions():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    with pipeline(2, mesh=mesh) as pipe:
        trace = pipe.gather_trace()
        if trace is None:
            return None
        assert all(0 < record.begin <= record.end for record in trace.reductions)
        return sorted({record.stage for record in trace.reductions})


def test_each_replica_has_one_and_it_holds_the_reductions_of_all_stages():
    assert run(4, gather_reductions) == [[0, 1], None, [0, 1], None]


def gather_without(fault):
    pipe = pipeline(2, timeout=3)
    if dist.get_rank() == 1:
        fault()
    pipe.gather_trace()


@pytest.mark.parametrize("fault", [die, freeze])
def test_a_process_that_does_not_come_is_named(fault):
    first, second = outcomes(2, gather_without, fault)
    assert isinstance(second, Gone)
    assert isinstance(first, Failed) and first.kind is pe.PeerError, first
    why = "is gone" if fault is die else "has not come within 3 seconds"
    assert f"process 1 {why}" in first.message


def test_of_one_process_it_is_the_trace():
    with pe.Pipeline([nn.Linear(4, 4), nn.Linear(4, 4)], None, 2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.PipelineError, match="run a step first"):
            pipe.gather_trace()
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))
        assert pipe.gather_trace() is pipe.trace
