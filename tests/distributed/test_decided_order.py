"""Tensor-parallel stages that react: one process of each group decides what is next, and the others follow."""

import os
import random
import signal
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Gone, die, freeze, outcomes, run
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import pipeline_ext as pe

COUNT = 6  # microbatches
STEPS = 4
SIZE = 8
PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Late(torch.autograd.Function):
    """The identity, whose forward and backward take some time."""

    @staticmethod
    def forward(ctx, x, wait):
        ctx.wait = wait
        wait()
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        ctx.wait()
        return gradient, None


class Block(nn.Module):
    def __init__(self, index, wait):
        super().__init__()
        torch.manual_seed(index)
        self.up, self.down = nn.Linear(SIZE, 2 * SIZE), nn.Linear(2 * SIZE, SIZE)
        self.wait = wait

    def forward(self, x):
        return x + self.down(self.up(Late.apply(x, self.wait)).relu())


def noise():
    """Waits for a time that differs between processes and tasks."""
    chance = random.Random(dist.get_rank())
    return lambda: time.sleep(0.02 * chance.random() ** 3)


def in_columns(mesh, count, wait):
    return [parallelize_module(Block(index, wait), mesh["tp"], PLAN) for index in range(count)]


def sharded(mesh, count, wait):
    return [fully_shard(Block(index, wait), mesh=mesh["tp"]) for index in range(count)]


def batch(step=0):
    return torch.randn(2, 2 * COUNT, SIZE, generator=torch.Generator().manual_seed(step))


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def trained(mesh, schedule, stages_of, reactive, evaluates=False):
    """The orders that this process ran, and all gradients and losses it saw, by step."""
    stages = stages_of(mesh, 2 if schedule in ("gpipe", "1f1b", "zb-h1") else 4, noise())
    orders, numbers = [], []
    with pe.Pipeline(
        stages, None, COUNT, schedule, F.mse_loss, mesh=mesh, reactive=reactive, timeout=20
    ) as pipe:
        assert pipe.plan.reactive is reactive
        planned = pipe.plan.order()[mesh.get_local_rank("pp")]
        for step in range(STEPS):
            x, y = batch(step)
            pipe.zero_grad()
            numbers.append(pipe.step(x, target=y).detach().clone())
            numbers += [local(p.grad).clone() for p in pipe.parameters()]
            orders.append([task.action for task in pipe.trace.tasks])
            if evaluates:
                out = pipe.eval(x)
                numbers += [] if out is None else [out.clone()]
    return planned, orders, numbers


def react(schedule, stages_of, evaluates):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    planned, orders, numbers = trained(mesh, schedule, stages_of, True, evaluates)
    _, in_order, expected = trained(mesh, schedule, stages_of, False, evaluates)
    assert in_order == [planned] * STEPS
    assert len(numbers) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(numbers, expected))
    return planned, orders


@pytest.mark.parametrize(
    "schedule, stages_of, evaluates",
    [
        ("zb-h1", in_columns, False),
        ("interleaved-1f1b", in_columns, True),
        ("zbv", in_columns, False),
        ("interleaved-1f1b", sharded, False),
    ],
)
def test_partners_run_one_order_that_reacts_with_the_bits_of_the_planned_one(schedule, stages_of, evaluates):
    found = run(4, react, schedule, stages_of, evaluates)
    for leader, follower in (found[:2], found[2:]):
        assert leader == follower
    assert any(order != planned for planned, orders in found for order in orders)


def choose():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    stages = in_columns(mesh, 2, noise())
    with pe.Pipeline(stages, None, COUNT, "auto", F.mse_loss, mesh=mesh, timeout=20) as pipe:
        for step in range(5):
            x, y = batch(step)
            pipe.step(x, target=y)
        return pipe.plan.to_csv()


def test_partners_follow_one_choice():
    assert len(set(run(4, choose))) == 1


def overlap():
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "tp"))
    stages = [nn.Linear(4, 4)]
    with pe.Pipeline(stages, None, 2, loss_fn=F.mse_loss, mesh=mesh, overlap=True, timeout=20) as pipe:
        assert not pipe.plan.reactive
    stages = in_columns(mesh, 1, lambda: None)
    with pytest.raises(pe.InvalidArgument, match="in one order; give overlap=False"):
        pe.Pipeline(stages, None, 2, loss_fn=F.mse_loss, mesh=mesh, overlap=True)


def test_two_streams_keep_the_planned_order():
    run(2, overlap)


def refuse():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    stages = [parallelize_module(Block(index, lambda: None), mesh["pp"], PLAN) for index in range(2)]
    with pytest.raises(pe.InvalidArgument, match="must run all tasks in one order"):
        pe.Pipeline(stages, None, COUNT, loss_fn=F.mse_loss, mesh=mesh, timeout=20)


def test_parameters_that_other_processes_share_are_refused():
    run(4, refuse)


# Failures.


class Sum(torch.autograd.Function):
    """Adds up what the members of a group have: values in the forward, or else gradients in the backward.

    Unlike a DTensor's, its collectives go to the group that it is given, also after a failure: what torch has
    cached for a mesh it takes for any equal one.
    """

    @staticmethod
    def forward(ctx, x, group, of_values):
        ctx.group, ctx.of_values = group, of_values
        x = x.clone()
        if of_values:
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        if not ctx.of_values:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None


class Faulty(nn.Module):
    """In microbatch 1 of the second step it does ``fault``, if any, before it meets its partner."""

    def __init__(self, index, group, fault):
        super().__init__()
        torch.manual_seed(2 * index + dist.get_rank(group))
        self.up, self.down = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE, bias=False)
        self.group, self.fault, self.forwards = group, fault, 0
        self.store = dist.distributed_c10d._get_default_store().clone()

    def forward(self, x):
        self.forwards += 1
        if self.forwards == COUNT + 1:
            self.store.add("in the second step", 1)
        elif self.forwards == COUNT + 2 and self.fault is not None:
            while self.store.add("in the second step", 0) < dist.get_world_size():
                time.sleep(0.01)
            self.fault()
        return x + Sum.apply(self.down(self.up(Sum.apply(x, self.group, False)).relu()), self.group, True)


def complain():
    raise ValueError("poisoned")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.5)  # the caller sees it before the step ends


def step_of(mesh, fault, timeout):
    group, here = mesh.get_group("tp"), mesh.get_local_rank("pp")
    stages = [Faulty(index, group, fault if index == here else None) for index in range(2)]
    pipe = pe.Pipeline(stages, None, COUNT, "1f1b", F.mse_loss, mesh=mesh, timeout=timeout)
    x, y = batch()
    pipe.step(x, target=y)
    return pipe, x, y


def new_mesh():
    """Of new groups: a collective that some members never joined is left in the old ones."""
    found = []
    for rows in ([[0, 2], [1, 3]], [[0, 1], [2, 3]]):
        groups = [dist.new_group(row) for row in rows]
        found.append(next(g for g, row in zip(groups, rows) if dist.get_rank() in row))
    numbers = torch.arange(4).view(2, 2)
    return DeviceMesh.from_group(found, "cpu", mesh=numbers, mesh_dim_names=("pp", "tp"))


def fail(victim, fault, timeout):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "tp"))
    pipe, x, y = step_of(mesh, fault if dist.get_rank() == victim else None, timeout)
    with pytest.raises(BaseException) as failed:
        pipe.step(x, target=y)
    assert all(p.grad is None for p in pipe.parameters())
    with pytest.raises(pe.DeadPipeline):
        pipe.step(x, target=y)
    pipe.close()
    if fault in (complain, interrupt):  # all processes are there: a new pipeline works
        again = new_mesh()
        first, *_ = step_of(again, None, 20)
        expected = [p.grad.clone() for p in first.parameters()]
        assert all(grad.any() for grad in expected)
        first.close()
        second, *_ = step_of(again, None, 20)
        assert all(torch.equal(p.grad, e) for p, e in zip(second.parameters(), expected))
        second.close()
    return type(failed.value), "\n".join([str(failed.value), *getattr(failed.value, "__notes__", [])])


@pytest.mark.parametrize("fault", [complain, interrupt, die, freeze])
@pytest.mark.parametrize("victim", [0, 3])  # it leads, it follows
def test_a_failure_of_any_process_ends_the_step_in_all(victim, fault):
    found = outcomes(4, fail, victim, fault, 4, timeout=50)
    of_victim = found.pop(victim)
    if fault is complain:
        assert of_victim[0] is pe.StageError and "poisoned" in of_victim[1]
    elif fault is interrupt:
        assert of_victim[0] is KeyboardInterrupt
    else:
        assert isinstance(of_victim, Gone)
    for outcome in found:
        assert isinstance(outcome, tuple), outcome
        kind, text = outcome
        assert "every .grad of the model is None" in text
        if fault is die:  # the partner's own communication finds that first
            assert kind in (pe.PeerError, pe.StageError)
            assert f"process {victim}" in text or "Connection" in text, text
        else:
            assert kind in ((pe.PeerError, pe.StepTimeout) if fault is freeze else (pe.PeerError,)), text
            assert f"process {victim}" in text, text


def call_different(victim):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "tp"))
    stages = in_columns(mesh, 2, lambda: None)
    pipe = pe.Pipeline([nn.Sequential(*stages)], None, COUNT, loss_fn=F.mse_loss, mesh=mesh, timeout=4)
    x, y = batch()
    if dist.get_rank() == victim:
        pipe.eval(x)
    else:
        pipe.step(x, target=y)


@pytest.mark.parametrize("victim", [0, 1])
def test_processes_that_call_different_things_are_told(victim):
    found = outcomes(2, call_different, victim, timeout=40)
    assert all(issubclass(outcome.kind, pe.PipelineError) for outcome in found), found
    assert any("runs another plan" in outcome.message for outcome in found)
