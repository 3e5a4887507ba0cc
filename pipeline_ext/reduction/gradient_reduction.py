"""Averages the gradients of a pipeline's replicas while they still compute."""

from collections.abc import Sequence

import torch
from torch import nn

from ..base import arguments
from ..errors import InvalidArgument
from ..plan.records import ReductionTimes
from ..stages.last_backward import Body
from .buckets import FlatBucket
from .launcher import BucketLauncher
from .member import Member
from .replica_reduction import BUCKET_BYTES, REDUCIBLE, SHARED, ReplicaReduction


class GradientReduction(ReplicaReduction[FlatBucket]):
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
        self, member: Member, *, bucket_bytes: int = BUCKET_BYTES, wire: torch.dtype | None = None
    ) -> None:
        if not hasattr(member, "all_reduce"):
            raise InvalidArgument(
                f"member is {member!r}; give a ProcessGroupMember, or what "
                "LocalGroup(size).member(rank) returns"
            )
        if wire not in (None, *REDUCIBLE):
            raise InvalidArgument(f"wire is {wire!r}; give a torch type from float16 to float64, or None")
        super().__init__(member, arguments.count("bucket_bytes", bucket_bytes))
        self._wire = wire
        self._launcher = BucketLauncher(lambda bucket: bucket.launch(member))

    def watch(self, stage: int, backward: Body) -> Body:
        """``backward`` of a stage, `B` or `W`; a step's last one launches the reduction of its gradients."""
        return self._launcher.watch(stage, backward)

    def finish(self, timeout: float) -> list[ReductionTimes]:
        """Reduces the parameters that several stages hold, and waits until every gradient is the mean.

        Returns a record of each reduction: none in a step that does not reduce.
        Raises ReductionError and StepTimeout as ``Work.wait`` does.
        """
        if not self._reduces:
            for bucket in self._all():
                bucket.finish_unreduced()
            return []
        for bucket in self._buckets[SHARED]:
            bucket.launch(self._member)
        for bucket in self._all():
            bucket.finish(timeout)
        return [
            ReductionTimes(stage, *bucket.times, bucket.nbytes)
            for stage, found in self._buckets.items()
            for bucket in found
        ]

    def _bucket(self, parameters: Sequence[nn.Parameter]) -> FlatBucket:
        return FlatBucket(parameters, self._wire)

    def _begin(self) -> None:
        buffers = {bucket.memory for bucket in self._all()}
        for bucket in self._all():
            bucket.clone_misplaced(buffers)
        for bucket in self._all():
            bucket.bind()
        if self._reduces:
            of_stages = {stage: found for stage, found in self._buckets.items() if stage != SHARED}
            self._launcher.begin(of_stages, self._microbatches)
        else:
            self._launcher.pause()
