"""Replicas hold the mean of their gradients; these leave while stages still compute.

Held against plain autograd's gradients of each replica, averaged in the order of the replicas. Equal means
``torch.equal``, save where a test says otherwise.
"""

import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from models import chain, tree, tree_batch, tree_loss
from reference import assert_same_gradients, gradients, twin
from replicas import SOON, Replicas, average, batches, reference_replicas
from torch import nn

import pipeline_ext as pe
from pipeline_ext.packing import ALIGNMENT
from pipeline_ext.reduction import buckets


def assert_means(replicas, plains):
    for model, plain in zip(replicas.models, plains):
        assert_same_gradients(model, gradients(plain))


# -- the mean


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("schedule, stages", [("gpipe", 2), ("1f1b", 1), ("1f1b", 3), ("interleaved-1f1b", 4)])
@pytest.mark.parametrize("make", [chain, tree], ids=["chain", "tree"])
def test_both_replicas_hold_the_mean(make, schedule, stages, overlap):
    model, loss_fn = (make(), F.mse_loss) if make is chain else (make(), tree_loss)
    plains = [twin(model), twin(model)]
    with Replicas(model, stages, 4, schedule, loss_fn, overlap=overlap) as replicas:
        for _ in range(5):
            parts = batches(9) if make is chain else [tree_batch(9), tree_batch(9)]
            replicas.zero_grad()
            for plain in plains:
                plain.zero_grad()
            reference_replicas(plains, parts, 4, loss_fn)
            replicas.step(parts)
            assert_means(replicas, plains)


@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_replicas(size):
    model, parts = chain(), batches(size=size)
    plains = [twin(model) for _ in range(size)]
    reference_replicas(plains, parts, 3, F.mse_loss)
    with Replicas(model, 2, 3, loss_fn=F.mse_loss, size=size) as replicas:
        replicas.step(parts)
        assert_means(replicas, plains)


@pytest.mark.parametrize("bucket_bytes", [1, 2000, 25 * 2**20])
def test_buckets_hold_at_most_their_bytes(bucket_bytes):
    model, parts = chain(), batches()
    plains = [twin(model), twin(model)]
    reference_replicas(plains, parts, 3, F.mse_loss)
    with Replicas(model, 2, 3, loss_fn=F.mse_loss, bucket_bytes=bucket_bytes) as replicas:
        replicas.step(parts)
        assert_means(replicas, plains)
        sizes = [record.nbytes for record in replicas.pipes[0].trace.reductions]
    if bucket_bytes == 1:
        assert len(sizes) == len(list(model.parameters()))
    elif bucket_bytes == 2000:
        assert len(sizes) > 2
        largest = max(p.nbytes for p in model.parameters())
        assert all(nbytes <= max(bucket_bytes, largest + ALIGNMENT) for nbytes in sizes)
    else:
        assert len(sizes) == 2


class Cast(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def test_parameters_of_several_types_travel_in_buckets_of_each():
    types = (torch.float64, torch.bfloat16, torch.float32)
    layers = [part for t in types for part in (Cast(t), nn.Linear(12, 12, dtype=t))]
    model, parts = nn.Sequential(*layers), batches()
    plains = [twin(model), twin(model)]
    reference_replicas(plains, parts, 3, F.mse_loss)
    with Replicas(model, 1, 3, loss_fn=F.mse_loss) as replicas:
        replicas.step(parts)
        assert_means(replicas, plains)
        assert len(replicas.pipes[0].trace.reductions) == len(types)


def test_gradients_that_travel_as_bfloat16_are_within_its_rounding():
    # Each is rounded before it is sent and their mean after; bfloat16 has 8 bits, so a rounding errs by 2**-8.
    model, parts = chain(4, 64), batches(width=64)
    plains = [twin(model), twin(model)]
    for plain, part in zip(plains, parts):
        reference_replicas([plain], [part], 3, F.mse_loss)
    with Replicas(model, 2, 3, loss_fn=F.mse_loss, wire=torch.bfloat16) as replicas:
        for _ in range(2):
            replicas.zero_grad()
            replicas.step(parts)
        for ours, theirs, a, b in zip(*(m.parameters() for m in (*replicas.models, *plains))):
            magnitude = (a.grad.abs() + b.grad.abs()) / 2
            error = (ours.grad - (a.grad + b.grad) / 2).abs()
            assert (error <= 2.01 * 2**-8 * magnitude).all() and error.any()
            assert torch.equal(ours.grad, theirs.grad)
            assert torch.equal(ours.grad, ours.grad.bfloat16().float())
        nbytes = [record.nbytes for record in replicas.pipes[0].trace.reductions]
        assert sum(nbytes) < 0.6 * sum(p.nbytes for p in model.parameters())


def test_parameters_that_several_stages_hold_are_reduced_too():
    first, last = nn.Linear(12, 12), nn.Linear(12, 12)
    last.weight = first.weight
    model, parts = nn.Sequential(first, nn.Tanh(), nn.Linear(12, 12), last), batches()
    alone = [twin(model), twin(model)]
    for part, single in zip(parts, alone):  # a tied sum is not plain autograd's bits
        with pe.Pipeline(single, 2, 3, loss_fn=F.mse_loss) as pipe:
            pipe.step(part[0], target=part[1])
    average(alone)
    with Replicas(model, 2, 3, loss_fn=F.mse_loss) as replicas:
        for _ in range(3):
            replicas.zero_grad()
            replicas.step(parts)
            assert_means(replicas, alone)
        assert [record.stage for record in replicas.pipes[0].trace.reductions] == [1, 0, -1]


# -- gradients as the user sees them


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wire", [None, torch.bfloat16], ids=str)
def test_gradients_have_the_strides_of_their_parameters(wire):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 4))
    model[0].to(memory_format=torch.channels_last)
    model[2].weight.data = model[2].weight.data.t().contiguous().t()
    plains = [twin(model) for _ in range(2)]
    data = [(torch.randn(4, 2, 4, 4), torch.randn(4, 4)) for _ in range(2)]
    with Replicas(model, 2, 2, loss_fn=F.mse_loss, wire=wire) as replicas:
        replicas.step(data)
        reference_replicas(plains, data, 2, F.mse_loss)
        for replica in replicas.models:
            for p, expected in zip(replica.parameters(), plains[0].parameters()):
                assert p.grad.stride() == p.stride()
                off = 0.0 if wire is None else 2**-7 * expected.grad.abs().max()
                torch.testing.assert_close(p.grad, expected.grad, rtol=0.0, atol=float(off))


@pytest.mark.parametrize("wire", [None, torch.float64])
def test_optimizers_made_before_and_after_train_as_without(wire):
    def optimizers(models, make):
        return [make(model.parameters()) for model in models]

    def momentum(parameters):
        return torch.optim.SGD(parameters, 0.1, momentum=0.9)

    model = chain(4)
    plains = [twin(model), twin(model)]
    expected = optimizers(plains, momentum) + optimizers(plains, torch.optim.Adam)
    replicas = Replicas(model)
    ours = optimizers(replicas.models, momentum)
    with replicas.wrap(2, 3, loss_fn=F.mse_loss, wire=wire):
        ours += optimizers(replicas.models, torch.optim.Adam)
        for step in range(6):
            parts = batches()
            for optimizer in expected + ours:
                optimizer.zero_grad(set_to_none=step % 2 == 0)
            reference_replicas(plains, parts, 3, F.mse_loss)
            replicas.step(parts)
            assert_means(replicas, plains)
            for optimizer in expected + ours:
                optimizer.step()
    for trained, plain in zip(replicas.models, plains):
        assert all(map(torch.equal, trained.parameters(), plain.parameters()))


def test_gradients_accumulate_over_steps():
    model = chain()
    plains = [twin(model), twin(model)]
    with Replicas(model, 2, 3, loss_fn=F.mse_loss) as replicas:
        for _ in range(3):
            parts = batches()
            reference_replicas(plains, parts, 3, F.mse_loss)
            replicas.step(parts)
            assert_means(replicas, plains)


def test_gradients_are_views_of_buffers_that_stay_and_nothing_is_packed(monkeypatch):
    monkeypatch.setattr(buckets, "packer", None)
    model, parts = chain(), batches()
    with Replicas(model, 2, 3, loss_fn=F.mse_loss) as replicas:
        addresses = []
        for _ in range(3):
            replicas.zero_grad()
            replicas.step(parts)
            addresses.append([p.grad.data_ptr() for m in replicas.models for p in m.parameters()])
        assert addresses[0] == addresses[1] == addresses[2]
        for model, pipe in zip(replicas.models, replicas.pipes):
            assert len({p.grad.untyped_storage().data_ptr() for p in model.parameters()}) == pipe.num_stages


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("wire", [None, torch.float64])
def test_gradients_that_the_user_set_are_added_to_and_stay_his(wire):
    model, parts = chain(), batches()
    plains = [twin(model), twin(model)]
    with Replicas(model, 2, 3, loss_fn=F.mse_loss, wire=wire) as replicas:
        replicas.step(parts)
        replicas.zero_grad()
        theirs = []
        for trained, plain in zip(replicas.models, plains):
            for i in (0, 4):
                given = torch.randn(12, 12).t()  # strided as no view of a buffer is
                trained[i].weight.grad = given
                plain[i].weight.grad = given.clone()
                theirs.append((trained[i].weight, given))
        for _ in range(2):
            reference_replicas(plains, parts, 3, F.mse_loss)
            replicas.step(parts)
            assert_means(replicas, plains)
            assert all(parameter.grad is given for parameter, given in theirs)


def test_a_gradient_moved_to_other_memory_is_still_reduced():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 3, 3))
    parts = [(torch.randn(4, 3, 8, 8), torch.randn(4, 3, 4, 4)) for _ in range(2)]
    plains = [twin(model), twin(model)]
    with Replicas(model, 2, 2, loss_fn=F.mse_loss) as replicas:
        for step in range(3):
            reference_replicas(plains, parts, 2, F.mse_loss)
            replicas.step(parts)
            assert_means(replicas, plains)
            if step == 0:
                for plain in [*plains, *replicas.models]:
                    plain.to(memory_format=torch.channels_last)  # gives .grad other memory, in place


class Reached(nn.Module):
    """Uses ``a`` for rows that are positive, ``b`` for others, ``c`` never."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return (self.a if x.detach().sum() > 0 else self.b)(x)


@pytest.mark.parametrize("wire", [None, torch.float64])
def test_a_parameter_has_a_gradient_where_any_replica_reached_it(wire):
    model = nn.Sequential(Reached(), nn.Linear(4, 4))
    plains = [twin(model), twin(model)]
    with Replicas(model, 2, 2, loss_fn=F.mse_loss, wire=wire) as replicas:
        for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1), (1, -1)):
            parts = [(sign * torch.rand(4, 4), torch.randn(4, 4)) for sign in signs]
            replicas.zero_grad()
            for plain in plains:
                plain.zero_grad()
            reference_replicas(plains, parts, 2, F.mse_loss)
            replicas.step(parts)
            assert_means(replicas, plains)
            assert (replicas.models[0][0].a.weight.grad is None) == (1 not in signs)
            assert replicas.models[0][0].c.weight.grad is None


def test_a_gradient_that_is_there_stays_when_nothing_reaches_it():
    model, parts = nn.Sequential(Reached(), nn.Linear(4, 4)), [(torch.ones(4, 4), torch.ones(4, 4))] * 2
    plains = [twin(model), twin(model)]
    with Replicas(model, 2, 2, loss_fn=F.mse_loss) as replicas:
        for _ in range(2):
            reference_replicas(plains, parts, 2, F.mse_loss)
            replicas.step(parts)
            for m in (*plains, *replicas.models):
                m.zero_grad(set_to_none=False)
        parts = [(-x, y) for x, y in parts]
        reference_replicas(plains, parts, 2, F.mse_loss)
        replicas.step(parts)
        assert_means(replicas, plains)
        assert not replicas.models[0][0].a.weight.grad.any()


def test_parameters_may_be_frozen_and_thawed_between_steps():
    model, parts = chain(), batches()
    plains = [twin(model), twin(model)]
    with Replicas(model, 2, 3, loss_fn=F.mse_loss) as replicas:
        for frozen in (True, False, True):
            for m in (*plains, *replicas.models):
                m.zero_grad()
                m[0].requires_grad_(not frozen)
            reference_replicas(plains, parts, 3, F.mse_loss)
            replicas.step(parts)
            assert_means(replicas, plains)
            assert (replicas.models[0][0].weight.grad is None) == frozen


def test_a_hook_that_gets_a_complete_gradient_gets_the_mean():
    model, parts = chain(), batches()
    plains = [twin(model), twin(model)]
    reference_replicas(plains, parts, 3, F.mse_loss)
    seen = []
    with Replicas(model, 2, 3, loss_fn=F.mse_loss) as replicas:
        for of_replica in replicas.models:
            of_replica[0].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        replicas.step(parts)
        assert_means(replicas, plains)
    assert len(seen) == 2 and all(torch.equal(grad, plains[0][0].bias.grad) for grad in seen)


# -- when they leave


class Wait(torch.autograd.Function):
    """The last of three backwards waits for an event."""

    @staticmethod
    def forward(ctx, x, counter, event):
        ctx.counter, ctx.event = counter, event
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.counter.append(1)
        assert len(ctx.counter) < 3 or ctx.event.wait(SOON), "the last stage's gradients have not left"
        return grad, None, None


class Waiting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.counter, self.event = [], None

    def forward(self, x):
        return Wait.apply(self.linear(x), self.counter, self.event)


class Telling:
    """A member that tells when its first reduction of a step has ended."""

    def __init__(self, member):
        self._member = member
        self.event = threading.Event()

    def __getattr__(self, name):
        return getattr(self._member, name)

    def all_reduce(self, tensor):
        work = self._member.all_reduce(tensor)
        work.future.add_done_callback(lambda _: self.event.set())
        return work


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_gradients_of_the_last_stage_are_reduced_while_the_first_computes(schedule, tmp_path):
    members = []

    def telling(member):
        members.append(Telling(member))
        return members[-1]

    model = nn.Sequential(Waiting(), nn.Linear(12, 12))
    with Replicas(model, 2, 3, schedule, F.mse_loss, members=telling) as replicas:
        for m, member in zip(replicas.models, members):
            m[0].event = member.event
        replicas.step(batches())
        for pipe in replicas.pipes:
            (waited,) = (record for record in pipe.trace.tasks if record.action == "0B2")
            last, first = pipe.trace.reductions
            assert (last.stage, first.stage) == (1, 0)
            assert 0 < last.begin <= last.end < waited.end
            assert waited.begin < first.begin <= first.end
        pipe.trace.save(tmp_path / "trace.json")
        assert (tmp_path / "trace.json").read_text().count("reduce stage 1") == 2  # begin and end


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_in_a_last_backward_buffers_leave_as_they_fill_up(schedule):
    """The first layer's last backward waits until a gradient of the layer after it has been reduced."""
    members = []

    def telling(member):
        members.append(Telling(member))
        return members[-1]

    model = nn.Sequential(nn.Sequential(Waiting(), nn.Linear(12, 12)))
    plains = [twin(model), twin(model)]
    at_once = threading.Event()
    at_once.set()
    with Replicas(model, 1, 3, schedule, F.mse_loss, members=telling, bucket_bytes=1) as replicas:
        for step in range(2):
            parts = batches()
            for m in (*replicas.models, *plains):
                m.zero_grad()
                m[0][0].counter.clear()
                m[0][0].event = at_once
            if step == 1:  # in the first nobody knows yet when a buffer is full
                for m, member in zip(replicas.models, members):
                    member.event.clear()
                    m[0][0].event = member.event
            reference_replicas(plains, parts, 3, F.mse_loss)
            replicas.step(parts)
            assert_means(replicas, plains)
        for pipe in replicas.pipes:
            last = max(record.end for record in pipe.trace.tasks)
            assert sum(record.begin < last for record in pipe.trace.reductions) >= 2


class Twice(nn.Module):
    """Adds to its weight's gradient twice in a backward."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        for _ in range(2):
            x = torch.utils.checkpoint.checkpoint(self.linear, x, use_reentrant=True)
        return self.last(x)


def test_a_buffer_waits_for_all_that_is_added_to_it():
    model = nn.Sequential(nn.Linear(12, 12), Twice())
    plains = [twin(model), twin(model)]
    with Replicas(model, 1, 3, "1f1b", F.mse_loss, bucket_bytes=1) as replicas:
        for _ in range(3):
            parts = batches()
            reference_replicas(plains, parts, 3, F.mse_loss)
            replicas.step(parts)
            assert_means(replicas, plains)
