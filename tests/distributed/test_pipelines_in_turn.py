"""Pipelines that the same processes make one after another: what each has opened ends with it."""

import gc
import os
import time
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import pipeline_ext as pe


def held():
    """Threads and files of this process."""
    return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def make_and_close(count, replicas):
    """Pipelines, kept when they are closed; how much this process holds after two of them and after all."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 1) if replicas else (1, 2), mesh_dim_names=("dp", "pp"))
    pipes, counts = [], []
    for number in range(count):
        if dist.get_rank() == number % size:
            time.sleep(0.01)  # they are not closed together
        pipe = pe.Pipeline(tied(), 1 if replicas else 2, 2, loss_fn=F.mse_loss, mesh=mesh, timeout=20)
        pipe.step(torch.ones(4, 4), target=torch.zeros(4, 4))
        pipe.eval(torch.ones(4, 4))
        pipe.close()
        pipes.append(pipe)
        counts.append(held())
    return counts[1], counts[-1]


@pytest.mark.parametrize("count, replicas", [(20, False), (8, True)])
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts threads and files in /proc")
def test_pipelines_that_are_closed_leave_no_threads_or_files(count, replicas):
    for first, last in run(2, make_and_close, count, replicas):
        assert last[0] <= first[0] and last[1] <= first[1], (first, last)


def make_and_forget(schedule):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "pp"))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    pipe = pe.Pipeline(model, 4, 4, schedule=schedule, loss_fn=F.mse_loss, mesh=mesh, timeout=20)
    gc.collect()
    gc.disable()  # what goes, goes by its last reference
    pipe.step(torch.ones(4, 4), target=torch.zeros(4, 4))
    pipe.eval(torch.ones(4, 4))
    alive = [weakref.ref(pipe), weakref.ref(model)]
    dist.barrier()
    del pipe, model
    return [type(ref()).__name__ for ref in alive if ref() is not None]


@pytest.mark.parametrize("schedule", ["interleaved-1f1b", "zbv"])
def test_a_pipeline_is_freed_with_its_last_reference_in_each_process(schedule):
    assert run(2, make_and_forget, schedule) == [[], []]
