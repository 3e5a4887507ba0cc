"""torch.distributed.pipelining on this engine, with the same names and sub-modules.

A script only changes its imports. Schedules are this package's; stages, tracing and chunking are torch's own.
"""

import importlib
import pkgutil
import sys

from torch import __version__ as _torch_version
from torch.distributed import pipelining as _torch
from torch.distributed.pipelining import Pipe, SplitPoint, pipe_split, pipeline

from ..base import torch_release as _torch_release
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
from .stage import PipelineStage, build_stage

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

_torch_release.check(_torch_version)

for _module in pkgutil.iter_modules(_torch.__path__):
    if _module.name not in globals():
        globals()[_module.name] = sys.modules[f"{__name__}.{_module.name}"] = importlib.import_module(
            f"{_torch.__name__}.{_module.name}"
        )
