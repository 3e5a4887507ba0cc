"""Makes the engine of a torch schedule, in the one or more processes of its stages' group."""

import functools
from typing import Any

import torch.distributed as dist

from .. import _C
from ..engines.host import HostEngine
from ..engines.parts import EngineParts
from ..engines.process import ProcessEngine
from ..processes.agreement import check_agreement
from ..processes.group import Processes
from ..stages.shared_parameters import SharedParameters
from ..stages.wrapped import WrappedStages
from ..transport.exchange import Exchange
from ..transport.staged import StagedReceiver, StagedSender

_TIMEOUT = 1800.0  # seconds, in one process


def make_engine(plan: _C.Plan, schedule: Any, stage: Any) -> HostEngine:
    """All processes of the group call it together; ``stage`` is any stage of the schedule.

    Raises InvalidArgument if the schedules of several processes differ.
    """
    # Parameters shared by stages of this process need no locks: one thread runs them all.
    parts = EngineParts(
        plan=plan,
        devices=(),
        stages=[],
        exchange_of=Exchange,
        shared=SharedParameters({}),
        wrapped=WrappedStages((), plan.num_microbatches),
    )
    if stage.group_size == 1:
        return HostEngine(parts)
    processes = Processes.of(_group(stage), timeout_of(stage))
    assert processes is not None
    settings = {
        "n_microbatches": plan.num_microbatches,
        "scale_grads": schedule.scale_grads,
        "schedule": [type(schedule).__name__, *plan.to_csv().splitlines()],
    }
    check_agreement(processes, settings, processes.timeout)
    if stage.device.type == "cpu":
        return ProcessEngine(parts, processes)
    channel_types = StagedSender, functools.partial(StagedReceiver, device=stage.device)
    return ProcessEngine(parts, processes, channel_types)


def timeout_of(stage: Any) -> float:
    """Seconds without progress after which a step fails: the timeout of the stage's process group."""
    if stage.group_size == 1:
        return _TIMEOUT
    backend = _group(stage)._get_backend(stage.device)  # torch has no public way to its timeout
    return backend.options._timeout.total_seconds()


def _group(stage: Any) -> dist.ProcessGroup:
    group = dist.group.WORLD if stage.group is None else stage.group
    assert group is not None  # torch makes no stage without one
    return group
