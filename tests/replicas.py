"""Replicas of a pipeline, each stepped by a thread of its own; and what they are held against."""

import functools
import operator
from concurrent.futures import ThreadPoolExecutor

import torch
from reference import reference_step, twin

import pipeline_ext as pe

SOON = 60.0  # far below the timeouts that a hang would take


def batches(rows=6, width=12, size=2):
    """A batch and its target for each replica."""
    return [(torch.randn(rows, width), torch.randn(rows, width)) for _ in range(size)]


class Replicas:
    """``size`` copies of a model in equal pipelines of one group."""

    def __init__(self, model, *args, size=2, **options):
        """``args`` and ``options`` as ``wrap`` takes them; with none, it is left to the caller."""
        self.models = [twin(model) for _ in range(size)]
        self.pipes = []
        self._threads = ThreadPoolExecutor(size)
        if args:
            self.wrap(*args, **options)

    def wrap(self, *args, members=lambda m: m, bucket_bytes=25 * 2**20, wire=None, **options):
        """Makes the pipelines; ``members`` may put something around each replica's place in the group."""
        group = pe.LocalGroup(len(self.models))
        for rank, model in enumerate(self.models):
            member = members(group.member(rank))
            reduction = pe.GradientReduction(member, bucket_bytes=bucket_bytes, wire=wire)
            self.pipes.append(pe.Pipeline(model, *args, reduction=reduction, **options))
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self.pipes:
            pipe.close()
        self._threads.shutdown()

    def start(self, rank, batch):
        """A future of replica ``rank``'s step."""
        x, y = batch
        return self._threads.submit(lambda: self.pipes[rank].step(x, target=y))

    def step(self, batches):
        """The losses of one step of all on their batches; raises what the first of them raised."""
        futures = [self.start(rank, batch) for rank, batch in enumerate(batches)]
        return [future.result(SOON) for future in futures]

    def failures(self, batches):
        """What the replicas raised, by rank."""
        futures = [self.start(rank, batch) for rank, batch in enumerate(batches)]
        return [future.exception(SOON) for future in futures]

    def zero_grad(self, set_to_none=True):
        for model in self.models:
            model.zero_grad(set_to_none=set_to_none)


def reference_replicas(models, batches, microbatches, loss_fn):
    """Steps plain models on a batch each; leaves in each the mean of their gradients."""
    for model, (x, y) in zip(models, batches):
        reference_step(model, x, y, microbatches, loss_fn)
    average(models)


def average(models):
    """Gives all models the mean of their gradients: summed in their order, halves in float32."""
    for same in zip(*(model.parameters() for model in models)):
        if all(p.grad is None for p in same):
            continue
        wide = torch.promote_types(same[0].dtype, torch.float32)
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).to(wide) for p in same]
        mean = functools.reduce(operator.add, grads) / len(same)
        for p in same:
            p.grad = mean.to(p.dtype, copy=True)
