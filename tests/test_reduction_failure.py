"""Replicas fail together: whatever goes wrong in one is raised in all, promptly, and named."""

import threading

import pytest
import torch
import torch.nn.functional as F
from models import chain
from reference import assert_same_gradients, gradients, twin
from replicas import SOON, Replicas, batches, reference_replicas
from torch import nn

import pipeline_ext as pe


class Failing(nn.Module):
    """Raises in the microbatch whose rows hold a NaN: forward, or backward."""

    def __init__(self, where):
        super().__init__()
        self.linear, self.where = nn.Linear(12, 12), where

    def forward(self, x):
        poisoned = bool(x.detach().isnan().any())
        if poisoned and self.where == "forward":
            raise ValueError("poisoned")
        out = self.linear(x)
        if poisoned:
            out.register_hook(self._refuse)
        return out

    def _refuse(self, grad):
        raise ValueError("poisoned")


def fail_when_both_step(replicas, stage):
    """A replica that hears of a failure before its step is refused it, and keeps its gradients."""
    steps = threading.Event()

    def tell(*_):
        steps.set()

    def wait(*_):
        assert steps.wait(SOON)

    replicas.models[0][stage].register_forward_hook(tell)
    replicas.models[1][stage].register_forward_pre_hook(wait)


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_failure_in_one_replica_is_raised_in_all(stage, where, wire):
    layers = [nn.Linear(12, 12) for _ in range(3)]
    layers[stage] = Failing(where)
    good = batches()
    with Replicas(nn.Sequential(*layers), 3, 3, loss_fn=F.mse_loss, wire=wire) as replicas:
        replicas.step(good)
        fail_when_both_step(replicas, stage)
        x, y = good[1]
        poisoned = x.clone()
        poisoned[-1] = float("nan")
        ours, theirs = replicas.failures([good[0], (poisoned, y)])
        assert isinstance(theirs, pe.StageError) and theirs.stage == stage
        assert isinstance(ours, pe.ReductionError)
        assert "replica 1 failed with StageError" in str(ours) and "poisoned" in str(ours)
        for error in (ours, theirs):
            assert any("make a new one" in note for note in error.__notes__)
        assert all(p.grad is None for m in replicas.models for p in m.parameters())
        for m in replicas.models:
            m[0].requires_grad_(False)  # where a step begins, its buffers are made anew
            for p in m.parameters():
                p.grad = torch.ones_like(p)
        for error in replicas.failures(good):
            assert isinstance(error, pe.ReductionError) and "replica 1 failed" in str(error)
        assert all(p.grad.eq(1).all() for m in replicas.models for p in m.parameters())
        assert replicas.pipes[0].eval(x).shape == y.shape


class Detached(nn.Module):
    def forward(self, x):
        return x if x.isfinite().all() else x.detach()


def test_a_failure_after_the_gradients_have_left_is_raised_in_the_next_step_of_the_others():
    model, good = nn.Sequential(nn.Linear(12, 12), Detached()), batches()
    with Replicas(model, 2, 3, loss_fn=F.mse_loss) as replicas:
        *_, theirs = replicas.failures([good[0], (good[1][0] * float("nan"), good[1][1])])
        assert "nothing to train" in str(theirs)
        assert all(p.grad is None for p in replicas.models[1].parameters())
        with pytest.raises(pe.ReductionError, match="replica 1 failed .* nothing to train"):
            replicas.start(0, good[0]).result(SOON)


def test_a_replica_that_never_comes_is_named_when_the_time_is_out():
    good = batches()
    with Replicas(chain(), 2, 3, loss_fn=F.mse_loss, timeout=0.5) as replicas:
        with pytest.raises(pe.StepTimeout, match="replica 0 waited 0.5 seconds for replica 1"):
            replicas.start(0, good[0]).result(SOON)
        assert all(p.grad is None for p in replicas.models[0].parameters())
        with pytest.raises(pe.ReductionError, match="replica 0 waited"):
            replicas.start(1, good[1]).result(SOON)


def test_closing_a_pipeline_ends_its_wait_for_others(monkeypatch):
    called = threading.Event()

    def telling(member):
        reduce = member.all_reduce
        monkeypatch.setattr(member, "all_reduce", lambda tensor: (reduce(tensor), called.set())[0])
        return member

    good = batches()
    with Replicas(nn.Sequential(nn.Linear(12, 12)), 1, 3, loss_fn=F.mse_loss, members=telling) as replicas:
        future = replicas.start(0, good[0])
        assert called.wait(SOON)
        replicas.pipes[0].close()
        with pytest.raises(pe.PipelineError, match="closed"):
            future.result(SOON)
        with pytest.raises(pe.ReductionError, match="replica 0 failed with DeadPipeline"):
            replicas.start(1, good[1]).result(SOON)


def test_replicas_that_differ_are_told_so():
    good = batches()
    with Replicas(chain(), 2, 3, loss_fn=F.mse_loss) as replicas:
        replicas.models[1][0].requires_grad_(False)
        for error in replicas.failures(good):
            assert isinstance(error, pe.ReductionError) and "frozen alike" in str(error)


def test_a_bad_argument_ends_nothing():
    model, good = chain(), batches()
    plains = [twin(model), twin(model)]
    reference_replicas(plains, good, 3, F.mse_loss)
    with Replicas(model, 2, 3, loss_fn=F.mse_loss) as replicas:
        with pytest.raises(pe.InvalidArgument, match="target has 2 rows"):
            replicas.start(0, (good[0][0], good[0][1][:2])).result(SOON)
        weight = replicas.models[0][0].weight
        weight.grad = torch.eye(12).to_sparse()
        with pytest.raises(pe.InvalidArgument, match="sparse"):
            replicas.start(0, good[0]).result(SOON)
        assert weight.grad.is_sparse and replicas.models[0][0].bias.grad is None
        weight.grad = None
        replicas.step(good)
        for trained, plain in zip(replicas.models, plains):
            assert_same_gradients(trained, gradients(plain))


def test_a_gradient_that_comes_after_they_have_left_is_refused():
    good = batches()
    with Replicas(chain(), 2, 3, loss_fn=F.mse_loss) as replicas:
        used = [(x * m[0].bias, y) for (x, y), m in zip(good, replicas.models)]
        for error in replicas.failures(used):
            assert isinstance(error, pe.PipelineError)
            assert "use a parameter inside its stage alone" in str(error)


def test_what_cannot_be_reduced_is_refused_when_the_pipeline_is_made():
    def pipeline(model, reduction):
        return pe.Pipeline([model], 1, 1, loss_fn=F.mse_loss, reduction=reduction)

    def reduction(**options):
        return pe.GradientReduction(pe.LocalGroup(1).member(0), **options)

    with pytest.raises(pe.InvalidArgument, match="sparse=False"):
        pipeline(nn.Embedding(5, 4, sparse=True), reduction())
    with pytest.raises(pe.InvalidArgument, match="complex64"):
        pipeline(nn.Linear(4, 4, dtype=torch.complex64), reduction())
    with pytest.raises(pe.InvalidArgument, match="give a GradientReduction"):
        pipeline(nn.Linear(4, 4), pe.LocalGroup(1).member(0))
    with pytest.raises(pe.InvalidArgument, match="member"):
        pe.GradientReduction(pe.LocalGroup(1))
    with pytest.raises(pe.InvalidArgument, match="wire"):
        reduction(wire=torch.int32)
    with pytest.raises(pe.InvalidArgument, match="bucket_bytes"):
        reduction(bucket_bytes=0)
    used = reduction()
    pipeline(nn.Linear(4, 4), used).close()
    with pytest.raises(pe.InvalidArgument, match="each its own"):
        pipeline(nn.Linear(4, 4), used)


def test_a_pipeline_that_was_refused_uses_nothing_up():
    group, x = pe.LocalGroup(1), torch.randn(2, 4)
    first, second = (pe.GradientReduction(group.member(0)) for _ in range(2))
    for reduction in (first, second):
        with pytest.raises(pe.InvalidArgument, match="complex64"):
            pe.Pipeline([nn.Linear(4, 4, dtype=torch.complex64)], 1, 1, reduction=reduction, loss_fn=F.mse_loss)
        layer = nn.Linear(4, 4)
        with pe.Pipeline([layer], 1, 1, reduction=reduction, loss_fn=F.mse_loss) as pipe:
            pipe.step(x, target=x)
        assert layer.weight.grad.any()


def test_a_member_has_one_pipeline_until_that_is_closed():
    group, x = pe.LocalGroup(1), torch.randn(2, 4)
    first, second = (pe.GradientReduction(group.member(0)) for _ in range(2))
    with pe.Pipeline([nn.Linear(4, 4)], 1, 1, loss_fn=F.mse_loss, reduction=first) as pipe:
        with pytest.raises(pe.InvalidArgument, match="replica 0 of 1 .* has a pipeline already"):
            pe.Pipeline([nn.Linear(4, 4)], 1, 1, loss_fn=F.mse_loss, reduction=second)
        pipe.step(x, target=x)
    with pe.Pipeline([nn.Linear(4, 4)], 1, 1, loss_fn=F.mse_loss, reduction=second) as pipe:
        pipe.step(x, target=x)
