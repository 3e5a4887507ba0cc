"""Pipeline-parallel training for PyTorch with a native scheduler."""

from ._C import Plan, Skip
from .errors import (
    DeadPipeline,
    DeviceError,
    InvalidArgument,
    InvalidSchedule,
    PeerError,
    PipelineError,
    ReductionError,
    StageError,
    StepTimeout,
)
from .pack_choice import PackChoice
from .pipeline import Pipeline
from .planning import build_plan, schedule_names
from .policy import Placement, Policy
from .profile import Profile
from .reduction import GradientReduction, LocalGroup, ProcessGroupMember
from .report.records import ReductionRecord, TaskRecord
from .report.timeline import draw_plan
from .report.trace import Trace
from .schedule_choice import ScheduleChoice
from .simulation import Costs, Simulation, simulate
from .skips import pop, skips, stash
from .stage import WithLoss
from .state import load_checkpoint, save_checkpoint
from .step_graphs import GraphReport
from .transport.link import LocalLink

Plan.draw = draw_plan  # type: ignore[method-assign]  # the native core makes plans; Python draws them

__all__ = [
    "Costs",
    "DeadPipeline",
    "DeviceError",
    "GradientReduction",
    "GraphReport",
    "InvalidArgument",
    "InvalidSchedule",
    "LocalGroup",
    "LocalLink",
    "PackChoice",
    "PeerError",
    "Pipeline",
    "PipelineError",
    "Placement",
    "Plan",
    "Policy",
    "ProcessGroupMember",
    "Profile",
    "ReductionError",
    "ReductionRecord",
    "ScheduleChoice",
    "Simulation",
    "Skip",
    "StageError",
    "StepTimeout",
    "TaskRecord",
    "Trace",
    "WithLoss",
    "build_plan",
    "load_checkpoint",
    "pop",
    "save_checkpoint",
    "schedule_names",
    "simulate",
    "skips",
    "stash",
]
