"""Pipeline-parallel training for PyTorch with a native scheduler."""

from ._C import Plan
from .errors import (
    DeadPipeline,
    InvalidArgument,
    InvalidSchedule,
    PipelineError,
    StageError,
    StepTimeout,
)
from .pack_choice import PackChoice
from .pipeline import Pipeline
from .planning import build_plan, schedule_names
from .profile import Profile
from .report.records import TaskRecord
from .report.trace import Trace
from .simulation import Costs, Simulation, simulate
from .stage import WithLoss
from .transport.link import LocalLink

__all__ = [
    "Costs",
    "DeadPipeline",
    "InvalidArgument",
    "InvalidSchedule",
    "LocalLink",
    "PackChoice",
    "Pipeline",
    "PipelineError",
    "Plan",
    "Profile",
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
