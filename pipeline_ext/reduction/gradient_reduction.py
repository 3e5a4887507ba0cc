"""Gradients of the parameters, averaged between replicas of a pipeline while they still compute."""

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
from .departures import Departures
from .member import Member

_REDUCIBLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_SHARED = -1  # stands for the stages of parameters that several hold

_in_use: weakref.WeakSet[Member] = weakref.WeakSet()  # members that have a pipeline
_attaching = threading.Lock()


class GradientReduction:
    """Gives every replica the mean of the replicas' gradients; for ``Pipeline(reduction=...)``.

    In a stage's last backward, and once those of the stages after it have ended, its gradients leave in flat
    buffers as these fill up; ``step`` returns when all hold the mean. ``.grad`` is a view of such a
    buffer from step to step: clone what is to be kept. Example, for one of several processes::

        member = pe.ProcessGroupMember(torch.distributed.group.WORLD)
        pipe = pe.Pipeline(model, 2, 8, loss_fn=loss_fn, reduction=pe.GradientReduction(member))

    Args:
        member: the replica's place in its group: a ``ProcessGroupMember``, or among threads of one process
            what ``LocalGroup.member`` gives. It has one pipeline, until that is closed.
        bucket_bytes: most bytes in a buffer; a parameter larger than that gets a buffer of its own.
        wire: floating-point type that the gradients travel as and are rounded to; None: their own.

    Raises InvalidArgument for anything else.
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
        self._departures = Departures(lambda bucket: bucket.send(member))
        self._built_for: list[list[tuple]] | None = None
        self._buckets: dict[int, list[Bucket]] = {}  # by stage; last, of what several stages hold
        self._steps = 0
        self._sends = False  # whether this step does
        self._in_step = False

    def attach(self, stages: Sequence[Stage], shared: SharedParameters, microbatches: int) -> None:
        """Called by the one pipeline whose gradients it reduces.

        Raises InvalidArgument if it or its member has one already, and for parameters whose gradients cannot be
        reduced; then it may still be attached to another.
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
        self._build(stages, shared)
        with _attaching:
            if self._member in _in_use:
                raise InvalidArgument(
                    f"{self._member!r} has a pipeline already; give each a rank of its own, or close the first"
                )
            _in_use.add(self._member)
        self._stages, self._shared, self._microbatches = stages, shared, microbatches

    def watch(self, stage: int, backward: Body) -> Body:
        """``backward`` of a stage, B or W; in the last one of a step the stage's gradients leave."""
        return self._departures.watch(stage, backward)

    @contextlib.contextmanager
    def step(self, timeout: float, sends: bool = True) -> Iterator[None]:
        """Within it a step runs. If that fails, every gradient is None and the group of replicas ends.

        Unless it ``sends`` its gradients stay as they are, for later steps to add to. ``timeout`` is that of
        ``Member.begin``.

        Raises InvalidArgument for gradients that cannot be reduced, ReductionError where a replica has failed
        before; nothing has changed.
        """
        self._member.check()
        self._build(self._stages, self._shared)
        for bucket in self._all():
            bucket.check()
        buffers = {bucket.memory for bucket in self._all()}
        for bucket in self._all():
            bucket.clone_misplaced(buffers)
        for bucket in self._all():
            bucket.bind()
        self._steps += 1
        self._sends = sends
        self._in_step = True
        try:
            if sends:
                of_stages = {stage: found for stage, found in self._buckets.items() if stage != _SHARED}
                self._departures.begin(of_stages, self._microbatches)
                self._member.begin(self._plan(), timeout)
            else:
                self._departures.pause()
            yield
        except BaseException as error:
            self._member.abort(error)
            for bucket in self._all():
                bucket.clear()
            error.add_note("the group of replicas has ended: make a new one, and new pipelines")
            raise
        finally:
            self._in_step = False

    def finish(self, timeout: float) -> list[ReductionTimes]:
        """Sends what several stages hold, and waits until every gradient is the mean of all replicas'.

        Returns what it reduced: nothing in a step that does not send.

        Raises ReductionError and StepTimeout as ``Work.wait`` does.
        """
        if not self._sends:
            for bucket in self._all():
                bucket.keep()
            return []
        for bucket in self._buckets[_SHARED]:
            bucket.send(self._member)
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
        """What this step reduces, in words."""
        buffers = [
            f"{describe(bucket.buffer)} of {'several stages' if stage == _SHARED else f'stage {stage}'}"
            for stage, found in self._buckets.items()
            for bucket in found
        ]
        return [f"what step {self._steps} ends with", *buffers]

    def _build(self, stages: Sequence[Stage], shared: SharedParameters) -> None:
        """Makes the buckets, and makes them anew when parameters were frozen, thawed, replaced or cast."""
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
