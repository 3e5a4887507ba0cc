"""Plans as text: CSV both ways, the grammar of torch.distributed.pipelining, traces of what ran."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import chain
from reference import assert_same_gradients, gradients, reference_step, twin

import pipeline_ext as pe
from pipeline_ext import _C


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b"])
def test_a_plan_written_as_csv_trains_the_same(tmp_path, schedule):
    plan = pe.build_plan(schedule, num_stages=4, microbatches=5)
    path = tmp_path / "schedule.csv"
    path.write_text(plan.to_csv())
    model, x, y = chain(), torch.randn(9, 12), torch.randn(9, 12)
    plain = twin(model)
    reference_step(plain, x, y, 5, F.mse_loss)
    for given in (path, str(path)):
        model.zero_grad()
        with pe.Pipeline(model, 4, 5, given, F.mse_loss, reactive=False) as pipe:
            assert pipe.plan.order() == plan.order()
            pipe.step(x, target=y)
            assert pipe.trace.order() == plan.order()
        assert_same_gradients(model, gradients(plain))


def test_a_copied_plan_is_the_plan_and_one_that_is_pickled_says_what_to_do(tmp_path):
    plan = pe.build_plan("1f1b", num_stages=2, microbatches=3)
    assert copy.copy(plan) is copy.deepcopy(plan) is plan
    for holder in (plan, [plan], pe.simulate(plan)):
        with pytest.raises(pe.PipelineError, match="write its to_csv.* to a file, which build_plan .* take"):
            pickle.dumps(holder)
    (tmp_path / "plan.csv").write_text(plan.to_csv())
    again = pe.build_plan(tmp_path / "plan.csv", num_stages=2, microbatches=3)
    assert again.order() == plan.order()


def torch_schedules():
    return pytest.importorskip("torch.distributed.pipelining.schedules")


def test_all_of_torchs_action_text_is_read_and_written():
    theirs = torch_schedules()
    cells = [
        ["0UNSHARD", "0F0", "0SEND_F0", "(0F1;0B0)OVERLAP_F_B", "0SEND_F1", "0B1", "0REDUCE_GRAD", "0RESHARD"],
        ["1UNSHARD", "1RECV_F0", "1F0", "1I0", "1W0", "1RECV_F1", "1F1", "1B1", "1RESHARD"],
    ]
    cells = [list(row) for row in cells]
    plan = _C.plan_of_cells(cells, reactive=True)
    assert list(plan.order().values()) == cells
    for row in cells:
        for cell in row:
            assert str(theirs._Action.from_str(cell)) == cell


def test_orders_that_torch_makes_are_read():
    theirs = torch_schedules()
    for stages, microbatches in ((2, 4), (4, 8)):
        order = {}
        for rank in range(stages):
            actions = theirs._get_1f1b_rank_ops(
                1, stages, stages - 1 - rank, microbatches - stages + 1 + rank, stages - 1 - rank,
                rank, lambda step, r=rank: r, lambda step, r=rank: r,
            )  # fmt: skip
            order[rank] = [str(a) if a is not None else "" for a in actions]
        plan = pe.build_plan(order, num_stages=stages, microbatches=microbatches)
        assert plan.order() == pe.build_plan("1f1b", num_stages=stages, microbatches=microbatches).order()


def test_messages_in_an_order_need_no_code_in_one_process():
    order = [
        ["0F0", "0SEND_F0", "0F1", "0SEND_F1", "0RECV_B0", "0B0", "0RECV_B1", "0B1"],
        ["1RECV_F0", "1F0", "1RECV_F1", "1B0", "1SEND_B0", "1F1", "1B1", "1SEND_B1"],
    ]
    model, x, y = chain(), torch.randn(6, 12), torch.randn(6, 12)
    plain = twin(model)
    reference_step(plain, x, y, 2, F.mse_loss)
    with pe.Pipeline(model, 2, 2, order, F.mse_loss, reactive=False) as pipe:
        assert pipe.plan.num_messages == 4
        pipe.step(x, target=y)
        assert pipe.trace.order() == dict(enumerate(order))
    assert_same_gradients(model, gradients(plain))


def test_another_microbatch_order_is_its_own_reference():
    # Backward in descending order: the sums differ from the ascending ones in their last bits.
    order = [["0F0", "0F1", "0F2", "0B2", "0B1", "0B0"]]
    model, x, y = chain(), torch.randn(9, 12), torch.randn(9, 12)
    plain = twin(model)
    for m in (2, 1, 0):
        a, b = x.tensor_split(3)[m], y.tensor_split(3)[m]
        (F.mse_loss(plain(a), b) * (3 / 9)).backward()
    with pe.Pipeline(model, 1, 3, order, F.mse_loss) as pipe:
        pipe.step(x, target=y)
    assert_same_gradients(model, gradients(plain))


def test_the_trace_tells_what_ran():
    model, x = chain(), torch.randn(8, 12)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=x)
        trace = pipe.trace
        assert len(trace.tasks) == len(pipe.plan) == 16
        assert all(0 <= r.begin <= r.end <= trace.step_time for r in trace.tasks)
        end = {r.action: r.end for r in trace.tasks}
        begin = {r.action: r.begin for r in trace.tasks}
        for task in range(len(pipe.plan)):
            for before in pipe.plan.dependencies(task):
                assert end[pipe.plan.action(before)] <= begin[pipe.plan.action(task)]
        for rank, busy in enumerate(trace.busy):
            assert busy == pytest.approx(sum(r.end - r.begin for r in trace.tasks if r.rank == rank))
            assert trace.bubble_by_rank[rank] == pytest.approx(1 - busy / trace.step_time)
        assert trace.bubble == pytest.approx(sum(trace.bubble_by_rank) / 2)
        profile = pipe.profile()
        assert len(profile.forward) == len(profile.backward) == 2
        assert min(profile.forward + profile.backward) > 0
        simulated = pipe.simulate()
        assert simulated.makespan < trace.step_time * 2


def test_what_waits_for_a_task_is_what_it_leads_to():
    plan = pe.build_plan("interleaved-1f1b", num_stages=6, num_ranks=3, microbatches=6, packs=[2] * 5)
    tasks = range(len(plan))
    waits = {(before, after) for after in tasks for before in plan.dependencies(after)}
    assert {(before, after) for before in tasks for after in plan.successors(before)} == waits


def test_messages_are_counted_where_ranks_differ():
    assert pe.build_plan("1f1b", num_stages=4, microbatches=5).num_messages == 2 * 3 * 5
    looped = pe.build_plan("interleaved-1f1b", num_stages=4, microbatches=5, num_ranks=2)
    assert looped.num_messages == 2 * 3 * 5
    assert pe.build_plan("interleaved-1f1b", num_stages=3, microbatches=5, num_ranks=1).num_messages == 0
