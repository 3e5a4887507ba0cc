"""torch.distributed.pipelining on this engine: the same names, and the same module names below.

A script changes its imports. What is not replaced here is torch's own: stages, tracing, chunking.
"""

import importlib
import pkgutil
import sys

from torch.distributed import pipelining as _torch
from torch.distributed.pipelining import Pipe, PipelineStage, SplitPoint, build_stage, pipe_split, pipeline

from . import microbatch, schedules, stage
from .schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
    _ScheduleForwardOnly,
)

__all__ = [
    "Pipe",
    "PipelineStage",
    "Schedule1F1B",
    "ScheduleDualPipeV",
    "ScheduleGPipe",
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "ScheduleLoopedBFS",
    "ScheduleZBVZeroBubble",
    "SplitPoint",
    "_ScheduleForwardOnly",
    "build_stage",
    "microbatch",
    "pipe_split",
    "pipeline",
    "schedules",
    "stage",
]

for _module in pkgutil.iter_modules(_torch.__path__):
    if _module.name not in globals():
        globals()[_module.name] = sys.modules[f"{__name__}.{_module.name}"] = importlib.import_module(
            f"{_torch.__name__}.{_module.name}"
        )
