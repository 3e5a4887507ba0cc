"""Pipeline-parallel training for PyTorch with a native scheduler."""

__version__ = "0.1.0"

from ._C import Plan, Skip
from .checkpoint.files import load_checkpoint, save_checkpoint
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
from .model.skips import pop, skips, stash
from .pipeline import Pipeline
from .plan.build import build_plan, schedule_names
from .plan.pack_choice import PackChoice
from .plan.policy import Placement, Policy
from .plan.profile import Profile
from .plan.records import ReductionRecord, TaskRecord
from .plan.schedule_choice import ScheduleChoice
from .plan.simulation import Costs, Simulation, simulate
from .reduction import GradientReduction, LocalGroup, ProcessGroupMember
from .report.trace import Trace
from .stages.stage import WithLoss
from .step.graphs import GraphReport
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
