"""Averages the gradients of replicas whose processes have a GPU each. Not yet run on GPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...plan.records import ReductionTimes
from ...reduction.buckets import Bucket
from ...reduction.member import Member
from ...reduction.replica_reduction import BUCKET_BYTES, ReplicaReduction
from .nccl import Sums


class DeviceReduction(ReplicaReduction["DeviceBucket"]):
    """Averages after a step's last backward, in one order of buckets, on the caller's stream.

    Hosts agree first on which parameters have a gradient in any replica, so that no GPU waits for a replica
    that failed before.
    """

    def __init__(self, member: Member) -> None:
        super().__init__(member, BUCKET_BYTES)
        self._sums: Sums | None = None

    def use(self, sums: Sums) -> None:
        """Sets what carries the gradients, which the engine makes."""
        self._sums = sums

    def finish(self, timeout: float) -> list[ReductionTimes]:
        if not self._reduces:
            return []
        assert self._sums is not None
        buckets = [*self._all()]
        present = self._in_any([p for bucket in buckets for p in bucket.parameters], timeout)
        with torch.no_grad():
            for bucket in buckets:
                bucket.average(self._sums, self._member.size, present)
        return []  # the GPU's clock is not the host's

    def _bucket(self, parameters: Sequence[nn.Parameter]) -> "DeviceBucket":
        return DeviceBucket(parameters)

    def _begin(self) -> None:
        pass  # gradients stay where they are

    def _in_any(self, parameters: Sequence[nn.Parameter], timeout: float) -> set[nn.Parameter]:
        """Those that have a gradient in any replica."""
        flags = torch.tensor([float(p.grad is not None) for p in parameters])
        self._member.all_reduce(flags).wait(timeout)
        return {p for p, mean in zip(parameters, flags.tolist(), strict=True) if mean > 0}


class DeviceBucket(Bucket):
    """Gradients that one operation sums, in float32 or float64, and that keep their memory."""

    def average(self, sums: Sums, size: int, present: set[nn.Parameter]) -> None:
        """Gives those ``present`` the mean of ``size`` replicas; one without gradient counts as zero."""
        averaged = [p for p in self.parameters if p in present]
        if not averaged:
            return
        for parameter in averaged:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [_gradient(parameter) for parameter in averaged]
        wide = torch.promote_types(grads[0].dtype, torch.float32)
        flat = torch.cat([grad.reshape(-1).to(wide) for grad in grads])
        sums.add_up(flat)
        flat.div_(size)
        means = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [mean.view(grad.shape) for mean, grad in zip(means, grads)])


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
