"""Activations alive at once, and what a step leaves behind."""

import ctypes
import gc
import os
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipeline_ext as pe


class Counting(nn.Module):
    """Counts, by weak references, how many of its activations are alive."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.lock = threading.Lock()
        self.alive = self.peak = 0

    def _die(self):
        with self.lock:
            self.alive -= 1

    def forward(self, x):
        hidden = self.linear(x)
        with self.lock:
            self.alive += 1
            self.peak = max(self.peak, self.alive)
        weakref.finalize(hidden, self._die)
        return hidden * self.scale  # keeps hidden for the backward, and hands it to nobody


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("reactive", [False, True])
@pytest.mark.parametrize("schedule, ranks", [("gpipe", 4), ("1f1b", 4), ("interleaved-1f1b", 2)])
def test_never_more_activations_alive_than_the_limit(schedule, ranks, reactive, overlap):
    stages = [Counting() for _ in range(4)]
    with pe.Pipeline(
        stages,
        microbatches=9,
        schedule=schedule,
        devices=["cpu"] * ranks,
        loss_fn=F.mse_loss,
        overlap=overlap,
        reactive=reactive,
    ) as pipe:
        for _ in range(10):
            pipe.step(torch.randn(18, 4), target=torch.randn(18, 4))
            for stage, limit, engine in zip(stages, pipe.plan.limits, pipe.trace.peak_in_flight_of_stage):
                assert stage.peak <= limit
                assert engine <= limit
            assert all(stage.alive == 0 for stage in stages)
        if not overlap and not reactive:
            assert [stage.peak for stage in stages] == pipe.plan.limits
            assert pipe.trace.peak_in_flight == pipe.simulate(pe.Costs()).peak_in_flight


def test_1f1b_holds_no_more_than_the_stages_below_it():
    plan = pe.build_plan("1f1b", num_stages=4, microbatches=9)
    assert plan.limits == [4, 3, 2, 1]
    assert pe.build_plan("gpipe", num_stages=4, microbatches=9).limits == [9] * 4


def test_a_pipeline_that_is_dropped_ends_its_threads_and_frees_its_model():
    before = threads()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    alive = weakref.ref(model[0].weight)
    pipe = pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss)
    pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))
    assert threads() == before + 2
    del pipe, model
    gc.collect()
    assert threads() == before
    assert alive() is None


def threads():
    return len(os.listdir("/proc/self/task"))


def files():
    return len(os.listdir("/proc/self/fd"))


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def bytes_in_use():
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = MallInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def test_thousands_of_steps_leave_nothing_behind(request):
    steps = 10_000 if request.config.getoption("--all") else 2_000
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x, y = torch.randn(2, 2), torch.randn(2, 2)
    with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss) as pipe:

        def run(steps):
            for _ in range(steps):
                model.zero_grad()
                pipe.step(x, target=y)
            gc.collect()
            return bytes_in_use(), len(gc.get_objects())

        memory, objects = run(1000)
        tasks, descriptors = threads(), files()
        after_memory, after_objects = run(steps)
        assert after_memory - memory < 10 * steps  # bytes
        assert after_objects - objects < 100
        assert threads() == tasks
        assert files() == descriptors
