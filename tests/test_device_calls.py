"""What a step asks of the CUDA driver: streams, waits, and nothing that would stop the host."""

import pytest
import torch
from device_log import WITHIN_A_STEP, Order
from torch import nn

import pipeline_ext
import pipeline_ext as pe

SCHEDULES = ["gpipe", "1f1b", "interleaved-1f1b"]
WITH_SENDS = [
    ["0F0", "0SEND_F0", "0F1", "0SEND_F1", "0RECV_B0", "0B0", "0RECV_B1", "0B1"],
    ["1RECV_F0", "1F0", "1B0", "1SEND_B0", "1RECV_F1", "1F1", "1B1", "1SEND_B1"],
]


def pipeline(stages=4, microbatches=6, **options):
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(stages)))
    return pe.Pipeline(model, stages, microbatches=microbatches, loss_fn=nn.functional.mse_loss, **options)


def step(pipe, standin, call=None):
    """One step, or ``call``; returns the order in the driver's log."""
    x = torch.randn(2 * pipe.microbatches, 4)
    standin.reset()
    (call or pipe.step)(x, **({} if call else {"target": x}))
    log = standin.log()
    # Before a step there is a look at whether an earlier one is done.
    looks = [i for i, entry in enumerate(log) if entry.name == "cuEventQuery"]
    assert len(looks) == len(set(pipe.devices)) and looks[-1] < 5 * len(looks)
    return Order(log[looks[-1] + 2 :])  # after the thread's capture mode is its own again


def laid_out(pipe):
    route = pipe._routes.train
    actions = [action for action, _, _ in route.layout.streams.ops]
    return route.plan, route.layout.streams, {action: i for i, action in enumerate(actions)}


def check(pipe, order):
    """Every dependency is covered by records and waits; the caller's streams follow all of it."""
    plan, streams, number = laid_out(pipe)
    assert len(order.before) == len(number)
    for task in range(len(plan)):
        for after in plan.successors(task):
            crosses = pipe.devices[plan.describe(task)[3]] != pipe.devices[plan.describe(after)[3]]
            before = streams.sent_by(task) if crosses else streams.op_of(task)
            assert before in order.before[streams.op_of(after)], (plan.action(task), plan.action(after))
        assert streams.op_of(task) in order.before[streams.sent_by(task)] | {streams.sent_by(task)}
    assert order.at_end == frozenset(range(len(number)))
    assert order.calls <= WITHIN_A_STEP


@pytest.mark.parametrize("options", [{}, {"overlap": False}, {"pack": 2}, {"reactive": False}], ids=str)
@pytest.mark.parametrize("ordinals", [(0, 0), (0, 1)], ids=["one GPU", "two GPUs"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_waits_cover_every_dependency_and_nothing_stops_the_host(gpus, standin, schedule, ordinals, options):
    ranks = 2 if schedule == "interleaved-1f1b" else 4
    devices = [f"cuda:{ordinals[rank * 2 // ranks]}" for rank in range(ranks)]
    with pipeline(schedule=schedule, devices=devices, **options) as pipe:
        for _ in range(2):
            check(pipe, step(pipe, standin))


@pytest.mark.parametrize("call", ["step", "eval"])
@pytest.mark.parametrize("non_blocking", [False, True])
def test_the_host_waits_for_copies_of_a_batch_once_all_is_enqueued(gpus, standin, call, non_blocking):
    with pipeline(devices=["cuda:0", "cuda:0", "cuda:1", "cuda:1"], non_blocking=non_blocking) as pipe:
        gpus.inputs_on_host = True
        x = torch.randn(12, 4)
        standin.reset()
        getattr(pipe, call)(x, **({"target": x} if call == "step" else {}))
        log = [entry for entry in standin.log() if entry.name in ("cuEventRecordWithFlags", "cuEventQuery")]
        waited = []  # at the end
        while log[-1].name == "cuEventQuery":
            waited.append(log.pop().args["event"])
        copies = 2 if call == "step" else 1  # to the first stage's device, and the last one's
        read = [entry.args["event"] for entry in log[:copies]]
        assert set(waited) == (set() if non_blocking else set(read))


def test_a_batch_that_is_not_read_in_time_fails_the_step(gpus, monkeypatch):
    with pipeline() as pipe:
        x = torch.randn(12, 4)
        with monkeypatch.context() as patch:
            patch.setattr(pipe._engine._executor.__class__, "wait_for_inputs", lambda *_, timeout: "timed out")
            with pytest.raises(pe.StepTimeout, match="every .grad.*is None.*\n  a GPU has not read the inputs"):
                pipe.step(x, target=x)
        assert all(p.grad is None for stage in pipe.stage_modules for p in stage.parameters())
        pipe.step(x, target=x)


def test_listed_sends_are_the_copies(gpus, standin):
    with pipeline(2, 2, schedule=WITH_SENDS, devices=["cuda:0", "cuda:1"]) as pipe:
        order = step(pipe, standin)
        copies = [call for call in standin.log() if call.name == "cuMemcpyPeerAsync"]
        assert len(copies) == 4
        _, _, number = laid_out(pipe)
        # A RECV asks nothing of the driver but its waits, so that no note tells of it.
        noted = [action for action in number if not action[0].startswith("RECV")]
        for m in range(2):
            for chain in (("F", 0), ("SEND_F", 0), ("F", 1)), (("B", 1), ("SEND_B", 1), ("B", 0)):
                one, two, three = (noted.index((*action, m)) for action in chain)
                assert one in order.before[two] and two in order.before[three]
    with pipeline(2, 2, schedule=WITH_SENDS, devices=["cuda:0", "cuda:0"]) as pipe:
        step(pipe, standin)
        assert not any(call.name == "cuMemcpyPeerAsync" for call in standin.log())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_forwards_and_backwards_that_run_together_lie_on_streams_without_a_path(gpus, standin, schedule):
    ranks = 2 if schedule == "interleaved-1f1b" else 4
    with pipeline(schedule=schedule, devices=["cuda:0"] * ranks) as pipe:
        order = step(pipe, standin)
        plan, streams, _ = laid_out(pipe)
        simulated = pe.simulate(plan)
        together = 0
        for f in range(len(plan)):
            for b in range(len(plan)):
                (kind, _, _, rank, _), (other, _, _, other_rank, _) = plan.describe(f), plan.describe(b)
                if (kind, other) != ("F", "B") or rank != other_rank:
                    continue
                i, j = streams.op_of(f), streams.op_of(b)
                if simulated.begin[f] < simulated.end[b] and simulated.begin[b] < simulated.end[f]:
                    together += 1
                    assert order.streams[i] != order.streams[j]
                    assert i not in order.before[j] and j not in order.before[i]
        assert together > 0 or schedule == "gpipe"


def test_in_steady_state_only_slots_and_the_plan_order_a_forward_and_a_backward(gpus, standin):
    with pipeline(2, 8, schedule="1f1b", devices=["cuda:0"] * 2) as pipe:
        order = step(pipe, standin)
        _, _, number = laid_out(pipe)
        for m in range(1, 6):
            forward, backward = number["F", 0, m + 1], number["B", 0, m]
            assert forward not in order.before[backward]
            assert backward not in order.before[forward]


def test_without_overlap_a_rank_has_one_stream(gpus, standin):
    with pipeline(4, devices=["cuda:0"] * 4, overlap=False) as pipe:
        assert len(set(step(pipe, standin).streams)) == 4
    options = {"schedule": "interleaved-1f1b", "devices": ["cuda:0"], "overlap": False}
    with pipeline(4, **options) as pipe:
        order = step(pipe, standin)
        assert len(set(order.streams)) == 1


def test_a_microbatch_stays_on_its_lane(gpus, standin):
    with pipeline(4, 12, devices=["cuda:0"] * 4) as pipe:
        order = step(pipe, standin)
        _, _, number = laid_out(pipe)
        for stage in range(4):
            for m in range(12):
                assert order.streams[number["F", stage, m]] == order.streams[number["B", stage, m]]


def test_both_parts_of_a_backward_stay_on_their_microbatchs_lane_and_wait_for_what_they_need(gpus, standin):
    orders = [[f"{s}{kind}{m}" for kind in "FIW" for m in range(6)] for s in range(3)]
    for ordinals in ((0, 0, 0), (0, 1, 1)):
        devices = [f"cuda:{ordinal}" for ordinal in ordinals]
        with pipeline(3, schedule=orders, devices=devices) as pipe:
            order = step(pipe, standin)
            check(pipe, order)
            _, _, number = laid_out(pipe)
            for stage in range(3):
                for m in range(6):
                    assert len({order.streams[number[kind, stage, m]] for kind in "FIW"}) == 1
            copies = [call for call in standin.log() if call.name == "cuMemcpyPeerAsync"]
            assert len(copies) == 12 * len(set(ordinals) - {0})


def test_what_a_stage_was_given_is_held_until_both_parts_of_its_backward_have_run(gpus):
    orders = [[f"{s}{kind}{m}" for kind in "FIW" for m in range(4)] for s in range(2)]
    with pipeline(2, 4, schedule=orders, devices=["cuda:0"] * 2) as pipe:
        route, held = pipe._routes.train, []
        keep = route.keepalive.keep

        def noted(value, made, used):
            held.append((made, used))
            keep(value, made, used)

        route.keepalive.keep = noted
        pipe.step(torch.randn(8, 4), target=torch.randn(8, 4))
        place = route.layout.position
        activations = [(place("F", 0, m), place("W", 1, m)) for m in range(4)]
        gradients = [(place("I", 1, m), place("W", 0, m)) for m in range(4)]
        assert sorted(held) == sorted(activations + gradients)


def test_an_evaluation_waits_for_what_it_needs_too(gpus, standin):
    with pipeline(devices=["cuda:0", "cuda:0", "cuda:1", "cuda:1"]) as pipe:
        pipe.eval(torch.randn(12, 4))
        order = step(pipe, standin, pipe.eval)
        layout = pipe._routes.eval(pipe.microbatches).layout
        number = {action: i for i, (action, _, _) in enumerate(layout.streams.ops)}
        for m in range(6):
            assert number["F", 0, m] in order.before[number["F", 1, m]]
            assert number["F", 1, m] in order.before[number["SEND_F", 1, m]]
            assert number["SEND_F", 1, m] in order.before[number["F", 2, m]]
        assert order.calls <= WITHIN_A_STEP
        assert order.at_end == frozenset(range(len(number)))


def test_what_two_streams_use_is_kept_until_its_stream_follows_the_last_use(gpus, standin, monkeypatch):
    from pipeline_ext.engines.cuda.keepalive import KeepAlive

    kept = []
    keep = KeepAlive.keep

    def watched(self, value, made, used):
        kept.append((self, made, used))
        keep(self, value, made, used)

    monkeypatch.setattr(KeepAlive, "keep", watched)
    for options in ({}, {"pack": 2}, {"pack": 3, "pack_forward": 2}, {"wire": torch.bfloat16}):
        for devices in (["cuda:0"] * 4, ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]):
            kept.clear()
            with pipeline(devices=devices, **options) as pipe:
                order = step(pipe, standin)
            assert len(kept) >= 2 * 3 * 6
            for keepalive, made, used in kept:
                until = keepalive._layout.streams.first_after(used.op, made.stream)
                assert until == len(order.before) or (
                    used.op in order.before[until]
                    and order.streams[until] == order.streams[made.op]
                    and until > used.op
                )
                assert made.op in order.before[used.op] | {used.op}
                assert len(keepalive) == 0
            # Most need not wait for the step's end: they would add up.
            early = sum(
                keepalive._layout.streams.first_after(used.op, made.stream) < len(order.before)
                for keepalive, made, used in kept
            )
            assert early > len(kept) / 2


def test_streams_have_priorities_do_not_wait_for_the_default_stream_and_serve_the_next_pipeline(gpus, standin):
    made = {}

    def train(devices):
        standin.reset()
        with pipeline(2, devices=devices) as pipe:
            calls = [call.args for call in standin.log() if call.name == "cuStreamCreateWithPriority"]
            made.update({args["stream"]: args for args in calls})
            order = step(pipe, standin)
            return order.streams, [c.args["stream"] for c in standin.log() if c.name == "cuMemcpyPeerAsync"]

    pipeline_ext._C.empty_stream_pool()
    before = standin.live()["stream"]
    _, copies = train(["cuda:0", "cuda:1"])
    assert len(set(copies)) == 2
    held = standin.live()["stream"]
    assert pipeline_ext._C.num_pooled_streams() == held - before == len(made)
    streams, again = train(["cuda:0", "cuda:1"])
    assert standin.live()["stream"] == held
    assert set(again) == set(copies)
    for stream in set(streams) & set(made):
        assert made[stream]["flags"] == 1
        assert (made[stream]["priority"] < 0) == (stream in copies)


def test_tools_see_a_range_for_each_task_and_without_a_tool_there_is_none(gpus, standin):
    with pipeline(2, 4, devices=["cuda:0"] * 2) as pipe:
        step(pipe, standin)
    assert gpus.ranges == []
    gpus.profiled = True
    with pipeline(2, 5, devices=["cuda:0"] * 2, pack=2) as pipe:
        step(pipe, standin)
    assert gpus.open_ranges == 0
    assert len(gpus.ranges) == 20
    assert "F stage 0 microbatch 3" in gpus.ranges
    names = [f"B stage 1 microbatch {m}" for m in range(5)]
    messages = ["", ", message of 2", "", ", message of 2", ", message of 1"]
    assert {name + message for name, message in zip(names, messages)} <= set(gpus.ranges)
