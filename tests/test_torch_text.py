"""Schedules travel to torch.distributed.pipelining and back as text."""

import pytest
from torch_orders import rank_operations, texts

import pipeline_ext as pe
from pipeline_ext import _C

schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
RUN_HERE = [name for name in _C.schedule_names() if _C.layout_of(name) != "bidirectional"]


def lowered(actions, num_stages, microbatches):
    """Torch's actions with all that it adds to run them: messages, sharding, reductions."""
    home = {
        part.stage_index: rank
        for rank, row in actions.items()
        for action in row
        if action is not None
        for part in action.sub_actions or (action,)
    }
    full = {
        rank: schedules._add_reduce_grad(schedules._add_unshard_reshard(row), microbatches)
        for rank, row in actions.items()
    }
    return schedules._add_send_recv(full, home.__getitem__, num_stages)


@pytest.mark.parametrize("reactive", [False, True])
@pytest.mark.parametrize("name", ["LoopedBFS", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"])
def test_what_torch_lists_and_what_it_runs_are_read(name, reactive):
    computed = rank_operations(f"Schedule{name}", 3, 2, 6)
    for actions in (computed, lowered(computed, 6, 6)):
        rows = texts(actions)
        plan = _C.plan_of_cells(list(rows.values()), reactive=reactive)
        assert plan.order() == rows
        assert pe.simulate(plan).makespan > 0


@pytest.mark.parametrize("schedule", RUN_HERE)
def test_torchs_runtime_reads_ours(tmp_path, schedule):
    class Runtime(schedules._PipelineScheduleRuntime):
        def __init__(self, plan):
            self.pp_group_size = plan.num_ranks
            self._num_stages, self._n_microbatches = plan.num_stages, plan.num_microbatches
            self._defer_pp_recv, self._stages, self.pipeline_order = False, [], {}

    plan = pe.build_plan(schedule, num_stages=4, microbatches=7)
    path = tmp_path / "schedule.csv"
    path.write_text(plan.to_csv())
    runtime = Runtime(plan)
    runtime._load_csv(path)
    assert runtime.stage_index_to_group_rank == dict(enumerate(plan.rank_of_stage))
    assert texts(runtime.pipeline_order) == plan.order()
    # What it makes of them comes back as the same step, with messages.
    full = texts(runtime.pipeline_order_with_comms)
    assert _C.plan_of_cells(list(full.values())).num_messages == plan.num_messages


@pytest.mark.parametrize(
    "cell", ["(0F1;1B0)OVERLAP_F_B", "(0F1;1I0)OVERLAP_F_B", "(1B0;0F1)OVERLAP_F_B", "(0F1;1I0;1W0)OVERLAP_F_B"]
)
def test_an_overlapped_cell_may_hold_any_actions(cell):
    rest = ["1W0"] if "W" not in cell and "I" in cell else []
    order = [["0F0", "1F0", cell, *rest, "0B0", "1F1", "1B1", "0B1"]]
    assert str(schedules._Action.from_str(cell)) == cell
    assert list(_C.plan_of_cells(order).order().values()) == order
