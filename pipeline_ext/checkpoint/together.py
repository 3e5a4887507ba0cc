"""What all processes do together: if it fails in one, it fails in all."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import InvalidArgument, PipelineError


@contextlib.contextmanager
def together(what: str, alone: bool = False) -> Iterator[None]:
    """If the block raises in any process, raises in all of them, and none waits for it.

    ``alone``: this process does it without the others.
    """
    error = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as report:
        error, _ = next(iter(report.failures.values()))
        if not isinstance(error, Exception):
            raise error from None  # Ctrl-C, for one
    except Exception as raised:
        error = raised
    for failure in of_all(error and (isinstance(error, InvalidArgument), str(error)), alone):
        if failure is not None:
            refused, text = failure
            raise (InvalidArgument if refused else PipelineError)(f"{what}: {text}") from error


def of_all(value: Any, alone: bool = False) -> list[Any]:
    """The value of each process; of this one only, if it is ``alone``."""
    if alone or not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
