"""The engine for the stages of a torch schedule, in the process or processes of their group."""

from typing import Any

import torch.distributed as dist

from .. import _C
from ..errors import InvalidArgument
from ..host import HostEngine
from ..processes.agreement import check_agreement
from ..processes.engine import ProcessEngine
from ..processes.group import Processes
from ..recomputation import RecomputationGuard
from ..shared import SharedParameters
from ..transport.exchange import Exchange
from ..wrapped import WrappedStages

_TIMEOUT = 1800.0  # seconds, in one process


def make_engine(plan: _C.Plan, schedule: Any, stage: Any) -> HostEngine:
    """All processes of the group of ``stage``, one of the schedule's, make theirs together.

    Raises InvalidArgument, with several processes, for stages on GPUs, or where the schedules differ.
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
    if stage.device.type != "cpu":
        raise InvalidArgument(
            f"stage {stage.stage_index} is on {stage.device}; the stages of several processes run on CPUs so "
            'far; give device=torch.device("cpu"), or a group of one process'
        )
    processes = Processes.of(_group(stage))
    settings = {
        "n_microbatches": plan.num_microbatches,
        "scale_grads": schedule.scale_grads,
        "schedule": [type(schedule).__name__, *plan.to_csv().splitlines()],
    }
    check_agreement(processes, settings, timeout_of(stage))
    return ProcessEngine(*parts, processes)


def timeout_of(stage: Any) -> float:
    """Seconds without progress after which a step is given up: those of the stage's process group."""
    if stage.group_size == 1:
        return _TIMEOUT
    backend = _group(stage)._get_backend(stage.device)  # torch has no public name for it
    return backend.options._timeout.total_seconds()


def _group(stage: Any) -> dist.ProcessGroup:
    return dist.group.WORLD if stage.group is None else stage.group
