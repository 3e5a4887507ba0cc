"""Pipeline-parallel training for PyTorch with a native scheduler."""

from ._C import Plan
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
from .reduction import GradientReduction, LocalGroup
from .report.records import ReductionRecord, TaskRecord
from .report.trace import Trace
from .schedule_choice import ScheduleChoice
from .simulation import Costs, Simulation, simulate
from .stage import WithLoss
from .step_graphs import GraphReport
from .transport.link import LocalLink

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
    "Profile",
    "ReductionError",
    "ReductionRecord",
    "ScheduleChoice",
    "Simulation",
    "StageError",
    "StepTimeout",
    "TaskRecord",
    "Trace",
    "WithLoss",
    "build_plan",
    "schedule_names",
    "simulate",
]
