"""What may run beside what, and what waits for what."""

import threading
import time

import pytest
import torch
from torch import nn

import pipeline_ext as pe


class Hooked(nn.Module):
    """The identity; calls ``on_forward(m)`` and ``on_backward(m)``, which may block."""

    def __init__(self, on_forward=lambda m: None, on_backward=lambda m: None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = on_forward, on_backward

    def forward(self, x):
        m = int(x.detach()[0, 0])  # each row holds the number of its microbatch
        self.calls[0](m)
        y = x * self.weight

        def hook(grad):
            self.calls[1](m)

        if y.requires_grad:
            y.register_hook(hook)
        return y


def rows(microbatches):
    return torch.arange(microbatches, dtype=torch.float32).repeat(2, 1).T.contiguous()


def total(out):
    return out.sum()


@pytest.mark.parametrize("overlap", [True, False])
def test_forward_and_backward_of_one_rank_meet_only_where_they_may(overlap):
    # Both wait for the other: they end only if they run at the same time.
    barrier = threading.Barrier(2)
    met = []

    def meet(m, mine):
        if m == mine:
            try:
                barrier.wait(timeout=10 if overlap else 0.3)
                met.append(mine)
            except threading.BrokenBarrierError:
                pass

    stage = Hooked(lambda m: meet(m, 1), lambda m: meet(m, 0))
    order = [["0F0", "0F1", "0B0", "0B1"]]
    with pe.Pipeline([stage], microbatches=2, schedule=order, loss_fn=total, overlap=overlap) as pipe:
        pipe.step(rows(2))
        assert sorted(met) == ([0, 1] if overlap else [])
        by_action = {r.action: r for r in pipe.trace.tasks}
        together = (
            by_action["0F1"].begin < by_action["0B0"].end and by_action["0B0"].begin < by_action["0F1"].end
        )
        assert together == overlap
        assert {r.stream for r in pipe.trace.tasks} == {"forward", "backward"}


@pytest.mark.parametrize("overlap", [True, False])
def test_a_backward_is_not_held_up_by_a_forward_whose_input_is_missing(overlap):
    # Stage 0 gives out microbatch 1 only when the middle stage has run microbatch 0 backward, although
    # the middle stage plans F1 before B0.
    done = threading.Event()
    waits = []
    first = Hooked(lambda m: m == 1 and waits.append(done.wait(10)))
    middle = Hooked(on_backward=lambda m: m == 0 and done.set())
    with pe.Pipeline([first, middle, Hooked()], microbatches=3, loss_fn=total, overlap=overlap) as pipe:
        assert pipe.plan.order()[1][:3] == ["1F0", "1F1", "1B0"]
        pipe.step(rows(3))
        assert waits == [True]
        order = pipe.trace.order()[1]
        assert order.index("1B0") < order.index("1F1")


@pytest.mark.parametrize("overlap", [True, False])
def test_a_forward_is_not_held_up_by_a_backward_whose_input_is_missing(overlap):
    # The last stage runs microbatch 0 backward only when stage 0 has run microbatch 2 forward, although
    # stage 0 plans B0 before F2; its slots allow for it.
    done = threading.Event()
    waits = []
    first = Hooked(lambda m: m == 2 and done.set())
    last = Hooked(on_backward=lambda m: m == 0 and waits.append(done.wait(10)))
    order = [
        ["0F0", "0F1", "0B0", "0F2", "0F3", "0B1", "0B2", "0B3"],
        ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2", "1F3", "1B3"],
    ]
    with pe.Pipeline([first, last], microbatches=4, schedule=order, loss_fn=total, overlap=overlap) as pipe:
        pipe.step(rows(4))
        assert waits == [True]
        ran = pipe.trace.order()[0]
        assert ran.index("0F2") < ran.index("0B0")


def test_a_static_rank_waits_for_what_it_planned():
    done = threading.Event()
    waits = []
    first = Hooked(lambda m: m == 1 and waits.append(done.wait(0.3)))
    middle = Hooked(on_backward=lambda m: m == 0 and done.set())
    with pe.Pipeline([first, middle, Hooked()], microbatches=3, loss_fn=total, reactive=False) as pipe:
        pipe.step(rows(3))
        assert waits == [False]
        assert pipe.trace.order()[1] == pipe.plan.order()[1]


def test_reactive_ranks_keep_the_order_of_each_stage_and_kind():
    def pause(m):
        time.sleep((m * 7919 % 5) * 1e-3)

    stages = [Hooked(pause, pause) for _ in range(6)]
    for schedule, ranks in (("1f1b", 6), ("interleaved-1f1b", 3), ("gpipe", 6)):
        with pe.Pipeline(
            stages, microbatches=7, schedule=schedule, devices=["cpu"] * ranks, loss_fn=total
        ) as pipe:
            pipe.step(rows(7))
            for stage in range(6):
                for kind in "FB":
                    ran = [r.microbatch for r in pipe.trace.tasks if (r.stage, r.kind) == (stage, kind)]
                    assert ran == list(range(7))


def test_ranks_run_at_the_same_time():
    # Three stages meet in three different tasks.
    barrier = threading.Barrier(3)
    stages = [Hooked(lambda m, s=s: m == 2 - s and barrier.wait(timeout=10)) for s in range(3)]
    with pe.Pipeline(stages, microbatches=3, schedule="gpipe", loss_fn=total) as pipe:
        pipe.step(rows(3))
    assert not barrier.broken
