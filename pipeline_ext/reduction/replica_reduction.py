"""Averages the gradients of a pipeline's replicas: what is the same wherever they compute."""

import contextlib
import itertools
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import nn

from ..base.imported import is_dtensor
from ..base.tensors import describe
from ..errors import DeadPipeline, InvalidArgument
from ..plan.records import ReductionTimes
from ..stages.shared_parameters import SharedParameters
from ..stages.stage import Stage
from ..stages.wrapped import reduced_in
from .buckets import Bucket, group_for_buckets
from .member import ENDED, Member

REDUCIBLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHARED = -1  # in place of a stage: parameters that several stages hold
BUCKET_BYTES = 25 * 2**20

in_use: weakref.WeakSet[Member] = weakref.WeakSet()  # members that have a pipeline
_attaching = threading.Lock()

AnyBucket = TypeVar("AnyBucket", bound=Bucket)


class ReplicaReduction(ABC, Generic[AnyBucket]):
    """Gives every replica the mean of the replicas' gradients, in buckets.

    Attributes:
        in_step: whether a step runs.
    """

    def __init__(self, member: Member, bucket_bytes: int) -> None:
        """``member``: the replica's place. ``bucket_bytes``: most bytes in a bucket."""
        self._member = member
        self._bucket_bytes = bucket_bytes
        self._stages: Sequence[Stage] | None = None
        self._shared: SharedParameters | None = None
        self._microbatches = 0
        self._built_for: list[list[tuple[int, torch.dtype, torch.Size]]] | None = None
        self._buckets: dict[int, list[AnyBucket]] = {}  # by stage; those of shared parameters last
        self._steps = 0
        self._reduces = False  # whether this step does
        self.in_step = False

    @abstractmethod
    def _bucket(self, parameters: Sequence[nn.Parameter]) -> AnyBucket:
        """A new bucket of these."""

    @abstractmethod
    def _begin(self) -> None:
        """Prepares for a step, which ``_reduces`` or not; its gradients can be reduced."""

    @abstractmethod
    def finish(self, timeout: float) -> list[ReductionTimes]:
        """Ends a step: if it reduces, every gradient is the mean then.

        Returns a record of each reduction whose times are known.
        Raises ReductionError and StepTimeout as ``Work.wait`` does.
        """

    @property
    def rank(self) -> int:
        """Which of the replicas this one is."""
        return self._member.rank

    def attach(self, stages: Sequence[Stage], shared: SharedParameters, microbatches: int) -> None:
        """Called by the one pipeline whose gradients it reduces.

        Raises InvalidArgument if it or its member has a pipeline already, and for parameters whose gradients
        cannot be reduced; then another pipeline may still attach it.
        """
        if self._stages is not None:
            raise InvalidArgument("this GradientReduction has a pipeline already; give each its own")
        layers = (layer for stage in stages for module in stage.modules() for layer in module.modules())
        for layer in layers:
            if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse:
                raise InvalidArgument(
                    f"{layer} makes a sparse gradient, and replicas reduce dense ones only; make it with "
                    "sparse=False"
                )
        self._make_buckets(stages, shared)
        with _attaching:
            if self._member in in_use:
                raise InvalidArgument(
                    f"{self._member!r} has a pipeline already; give each a rank of its own, or close the first"
                )
            in_use.add(self._member)
        self._stages, self._shared, self._microbatches = stages, shared, microbatches

    @contextlib.contextmanager
    def step(self, timeout: float, reduces: bool = True) -> Iterator[None]:
        """A step runs within it. If the step fails, every gradient is None and the group of replicas ends.

        A step that does not reduce leaves its gradients for later steps to add to. ``timeout`` is that of
        ``Member.begin``.

        Raises InvalidArgument for gradients that cannot be reduced, ReductionError if a replica failed before;
        then nothing has changed.
        """
        self._member.check()
        assert self._stages is not None and self._shared is not None
        self._make_buckets(self._stages, self._shared)
        for bucket in self._all():
            bucket.check()
        self._steps += 1
        self._reduces = reduces
        self.in_step = True
        try:
            self._begin()
            if reduces:
                self._member.begin(self._plan(), timeout)
            yield
        except BaseException as error:
            self.abandon(error)
            error.add_note(ENDED)
            raise
        finally:
            self.in_step = False

    def abandon(self, error: BaseException) -> None:
        """Ends the group, as other replicas may have the gradients of a step that has failed here."""
        self._member.abort(error)
        for bucket in self._all():
            bucket.clear()

    def mean(self, number: float, timeout: float) -> float:
        """The mean of all replicas' numbers, to be called in a step that reduces, before its gradients or after
        ``finish``.

        Raises InvalidArgument in a step that does not reduce; else as ``finish`` does.
        """
        if not self._reduces:
            raise InvalidArgument(
                "loss_weight with replicas needs their counts in each step, which no_sync does not share; in "
                'steps that add up, give loss_reduction="sum" and a loss_fn that divides by the count of all '
                "steps and replicas"
            )
        found = torch.tensor(number, dtype=torch.float64)
        self._member.all_reduce(found).wait(timeout)
        return float(found)

    def close(self) -> None:
        """Ends a step that waits for other replicas, and frees the member for another pipeline."""
        if self.in_step:
            self._member.abort(DeadPipeline("the pipeline was closed while a step ran"))
        in_use.discard(self._member)

    def _all(self) -> Iterator[AnyBucket]:
        return itertools.chain.from_iterable(self._buckets.values())

    def _plan(self) -> list[str]:
        """A description of what this step reduces."""
        buffers = [
            f"{describe(bucket.buffer)} of {'several stages' if stage == SHARED else f'stage {stage}'}"
            for stage, found in self._buckets.items()
            for bucket in found
        ]
        return [f"what step {self._steps} ends with", *buffers]

    def _make_buckets(self, stages: Sequence[Stage], shared: SharedParameters) -> None:
        """Makes the buckets, and again when parameters were frozen, unfrozen, replaced or cast."""
        tied = shared.parameters()
        others = {*tied, *reduced_in(module for stage in stages for module in stage.modules())}
        trained = {
            # Backward reaches the last parameters first.
            stage.index: [p for p in reversed(stage.parameters()) if p.requires_grad and p not in others]
            for stage in stages
        }
        trained[SHARED] = [p for p in tied if p.requires_grad]
        built_for = [[(id(p), p.dtype, p.shape) for p in parameters] for parameters in trained.values()]
        if built_for == self._built_for:
            return
        for parameter in itertools.chain.from_iterable(trained.values()):
            if is_dtensor(parameter):
                raise InvalidArgument(
                    f"a parameter is a DTensor of shape {list(parameter.shape)} (tensor parallelism), and "
                    'replicas reduce plain ones; wrap its stage in fully_shard(stage, mesh=mesh["dp"])'
                )
            if parameter.dtype not in REDUCIBLE:
                raise InvalidArgument(
                    f"a parameter is {describe(parameter)}; replicas reduce float64, float32, float16 and "
                    "bfloat16: freeze it, or cast it"
                )
        self._buckets = {
            stage: [self._bucket(group) for group in group_for_buckets(found, self._bucket_bytes)]
            for stage, found in trained.items()
        }
        self._built_for = built_for
