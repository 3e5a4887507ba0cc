"""The parts of which every engine is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _C
from ..reduction.replica_reduction import ReplicaReduction
from ..stages.shared_parameters import SharedParameters
from ..stages.stage import Stage
from ..stages.wrapped import WrappedStages
from ..transport.exchange import Exchange


@dataclass(frozen=True)
class EngineParts:
    """The parts of which an engine is made.

    Attributes:
        plan: the first plan. Later ones have the same stages on the same ranks.
        devices: one for each rank.
        stages: the stages of this process.
        exchange_of: makes the channels between the stages of a plan.
        shared: parameters that several stages hold.
        wrapped: stages in DistributedDataParallel or fully_shard.
        reduction: averages gradients over replicas; None without replicas.
        non_blocking: the caller leaves a batch alone until a GPU has read it.
        partners: the processes, as numbers in the world, that run the same tasks in the same order.
    """

    plan: _C.Plan
    devices: Sequence[torch.device]
    stages: list[Stage]
    exchange_of: Callable[..., Exchange]
    shared: SharedParameters
    wrapped: WrappedStages
    reduction: ReplicaReduction[Any] | None = None
    non_blocking: bool = False
    partners: Sequence[int] = ()
