"""Averages the gradients of a pipeline's replicas while they still compute."""

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..base import arguments
from ..base.imported import is_dtensor
from ..base.tensors import describe
from ..errors import DeadPipeline, InvalidArgument
from ..plan.records import ReductionTimes
from ..stages.last_backward import Body
from ..stages.shared_parameters import SharedParameters
from ..stages.stage import Stage
from ..stages.wrapped import reduced_in
from .buckets import Bucket, fill_buckets
from .launcher import BucketLauncher
from .member import ENDED, Member

_REDUCIBLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_SHARED = -1  # in place of a stage: parameters that several stages hold

_in_use: weakref.WeakSet[Member] = weakref.WeakSet()  # members that have a pipeline
_attaching = threading.Lock()


class GradientReduction:
    """Gives every replica the mean of the replicas' gradients; for ``Pipeline(reduction=...)``.

    A stage's gradients are reduced in flat buffers during its last backward, each buffer as soon as it is full
    and the last backwards of later stages have ended. ``step`` returns when all replicas hold the mean.
    ``.grad`` is a view of such a buffer from step to step: clone a gradient to keep it. Example, for one of
    several processes::

        member = pe.ProcessGroupMember(torch.distributed.group.WORLD)
        pipe = pe.Pipeline(model, 2, 8, loss_fn=loss_fn, reduction=pe.GradientReduction(member))

    Args:
        member: the replica's place in its group: a ``ProcessGroupMember``, or for threads of one process the
            result of ``LocalGroup.member``. It serves one pipeline until that is closed.
        bucket_bytes: most bytes in a buffer; a larger parameter gets a buffer of its own.
        wire: floating-point type that the gradients are rounded to and sent as; None: their own.

    Raises:
        InvalidArgument: for anything else.
    """

    def __init__(
        self, member: Member, *, bucket_bytes: int = 25 * 2**20, wire: torch.dtype | None = None
    ) -> None:
        if not hasattr(member, "all_reduce"):
            raise InvalidArgument(
                f"member is {member!r}; give a ProcessGroupMember, or what "
                "LocalGroup(size).member(rank) returns"
            )
        if wire not in (None, *_REDUCIBLE):
            raise InvalidArgument(f"wire is {wire!r}; give a torch type from float16 to float64, or None")
        self._member = member
        self._bucket_bytes = arguments.count("bucket_bytes", bucket_bytes)
        self._wire = wire
        self._stages: Sequence[Stage] | None = None
        self._shared: SharedParameters | None = None
        self._microbatches = 0
        self._launcher = BucketLauncher(lambda bucket: bucket.launch(member))
        self._built_for: list[list[tuple[int, torch.dtype, torch.Size]]] | None = None
        self._buckets: dict[int, list[Bucket]] = {}  # by stage; those of shared parameters last
        self._steps = 0
        self._reduces = False  # whether this step does
        self._in_step = False

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
            if self._member in _in_use:
                raise InvalidArgument(
                    f"{self._member!r} has a pipeline already; give each a rank of its own, or close the first"
                )
            _in_use.add(self._member)
        self._stages, self._shared, self._microbatches = stages, shared, microbatches

    def watch(self, stage: int, backward: Body) -> Body:
        """``backward`` of a stage, `B` or `W`; a step's last one launches the reduction of its gradients."""
        return self._launcher.watch(stage, backward)

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
        buffers = {bucket.memory for bucket in self._all()}
        for bucket in self._all():
            bucket.clone_misplaced(buffers)
        for bucket in self._all():
            bucket.bind()
        self._steps += 1
        self._reduces = reduces
        self._in_step = True
        try:
            if reduces:
                of_stages = {stage: found for stage, found in self._buckets.items() if stage != _SHARED}
                self._launcher.begin(of_stages, self._microbatches)
                self._member.begin(self._plan(), timeout)
            else:
                self._launcher.pause()
            yield
        except BaseException as error:
            self._member.abort(error)
            for bucket in self._all():
                bucket.clear()
            error.add_note(ENDED)
            raise
        finally:
            self._in_step = False

    def mean(self, number: float, timeout: float) -> float:
        """The mean of all replicas' numbers, to be called in a step that reduces, before its gradients.

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

    def finish(self, timeout: float) -> list[ReductionTimes]:
        """Reduces the parameters that several stages hold, and waits until every gradient is the mean.

        Returns a record of each reduction: none in a step that does not reduce.
        Raises ReductionError and StepTimeout as ``Work.wait`` does.
        """
        if not self._reduces:
            for bucket in self._all():
                bucket.finish_unreduced()
            return []
        for bucket in self._buckets[_SHARED]:
            bucket.launch(self._member)
        for bucket in self._all():
            bucket.finish(timeout)
        return [
            ReductionTimes(stage, *bucket.times, bucket.nbytes)
            for stage, found in self._buckets.items()
            for bucket in found
        ]

    def close(self) -> None:
        """Ends a step that waits for other replicas, and frees the member for another pipeline."""
        if self._in_step:
            self._member.abort(DeadPipeline("the pipeline was closed while a step ran"))
        _in_use.discard(self._member)

    def _all(self) -> Iterator[Bucket]:
        return itertools.chain.from_iterable(self._buckets.values())

    def _plan(self) -> list[str]:
        """A description of what this step reduces."""
        buffers = [
            f"{describe(bucket.buffer)} of {'several stages' if stage == _SHARED else f'stage {stage}'}"
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
        trained[_SHARED] = [p for p in tied if p.requires_grad]
        built_for = [[(id(p), p.dtype, p.shape) for p in parameters] for parameters in trained.values()]
        if built_for == self._built_for:
            return
        for parameter in itertools.chain.from_iterable(trained.values()):
            if is_dtensor(parameter):
                raise InvalidArgument(
                    f"a parameter is a DTensor of shape {list(parameter.shape)} (tensor parallelism), and "
                    'replicas reduce plain ones; wrap its stage in fully_shard(stage, mesh=mesh["dp"])'
                )
            if parameter.dtype not in _REDUCIBLE:
                raise InvalidArgument(
                    f"a parameter is {describe(parameter)}; replicas reduce float64, float32, float16 and "
                    "bfloat16: freeze it, or cast it"
                )
        self._buckets = {
            stage: fill_buckets(found, self._bucket_bytes, self._wire) for stage, found in trained.items()
        }
        self._built_for = built_for
