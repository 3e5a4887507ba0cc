"""torch.distributed.pipelining.stage, whose stages make no process groups for messages."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch.distributed import config
from torch.distributed.pipelining import stage as _torch

__all__ = ["PipelineStage", "build_stage"]

# Torch 2.14 has the first, later ones the second: a communicator for each direction, or for each edge. Here
# every boundary and direction has messages of its own.
_SWITCHES = ("pipeline_per_direction_p2p", "pipeline_per_edge_p2p")


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


@contextlib.contextmanager
def _without_groups() -> Iterator[None]:
    """Within it torch's stages make no groups, which not every process group can be split into."""
    with config.patch({name: False for name in _SWITCHES if hasattr(config, name)}):
        yield


class PipelineStage(_torch.PipelineStage):
    """Torch's stage."""

    @functools.wraps(_torch.PipelineStage.__init__)  # type: ignore[misc]  # mypy knows no decorated constructor
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _without_groups():
            super().__init__(*args, **kwargs)


@functools.wraps(_torch.build_stage)
def build_stage(*args: Any, **kwargs: Any) -> _torch._PipelineStage:
    with _without_groups():
        return _torch.build_stage(*args, **kwargs)
