"""The engine for the stages of a torch schedule, in the process or processes of their group."""

import functools
from typing import Any

import torch.distributed as dist

from .. import _C
from ..engines.host import HostEngine
from ..engines.process import ProcessEngine
from ..processes.agreement import check_agreement
from ..processes.group import Processes
from ..stages.recomputation import RecomputationGuard
from ..stages.shared_parameters import SharedParameters
from ..stages.wrapped import WrappedStages
from ..transport.exchange import Exchange
from ..transport.staged import StagedIncoming, StagedOutgoing

_TIMEOUT = 1800.0  # seconds, in one process


def make_engine(plan: _C.Plan, schedule: Any, stage: Any) -> HostEngine:
    """All processes of the group of ``stage``, one of the schedule's, make theirs together.

    Raises InvalidArgument where the schedules of several processes differ.
    """
    # A parameter of several local stages needs no care: one thread runs them all.
    nothing = (
        SharedParameters({}),
        RecomputationGuard((), overlap=False, threads=1),
        None,
        WrappedStages((), plan.num_microbatches),
    )
    parts = (plan, Exchange, *nothing)
    if stage.group_size == 1:
        return HostEngine(*parts)
    processes = Processes.of(_group(stage))
    settings = {
        "n_microbatches": plan.num_microbatches,
        "scale_grads": schedule.scale_grads,
        "schedule": [type(schedule).__name__, *plan.to_csv().splitlines()],
    }
    check_agreement(processes, settings, timeout_of(stage))
    if stage.device.type == "cpu":
        return ProcessEngine(*parts, processes)
    ends = StagedOutgoing, functools.partial(StagedIncoming, device=stage.device)
    return ProcessEngine(*parts, processes, ends)


def timeout_of(stage: Any) -> float:
    """Seconds without progress after which a step is given up: those of the stage's process group."""
    if stage.group_size == 1:
        return _TIMEOUT
    backend = _group(stage)._get_backend(stage.device)  # torch has no public name for it
    return backend.options._timeout.total_seconds()


def _group(stage: Any) -> dist.ProcessGroup:
    return dist.group.WORLD if stage.group is None else stage.group
