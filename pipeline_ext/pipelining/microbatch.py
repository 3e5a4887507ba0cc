"""torch.distributed.pipelining.microbatch, unchanged."""

from typing import Any

from torch.distributed.pipelining import microbatch as _torch
from torch.distributed.pipelining.microbatch import (
    TensorChunkSpec,
    merge_chunks,
    split_args_kwargs_into_chunks,
)

__all__ = ["TensorChunkSpec", "merge_chunks", "split_args_kwargs_into_chunks"]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)
