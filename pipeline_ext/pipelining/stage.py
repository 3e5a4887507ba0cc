"""torch.distributed.pipelining.stage, unchanged."""

from typing import Any

from torch.distributed.pipelining import stage as _torch
from torch.distributed.pipelining.stage import PipelineStage, build_stage

__all__ = ["PipelineStage", "build_stage"]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)
