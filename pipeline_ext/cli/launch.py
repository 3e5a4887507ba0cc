"""The processes that torchrun has started for a command."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from ..lm.team import Team


def processes() -> int:
    """How many there are; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """All of them, or this process alone."""
    if processes() == 1:
        yield Team()
        return
    # Started again, processes find torchrun's store as those before have left it; gloo would call these.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    yield Team(dist.group.WORLD)
    dist.destroy_process_group()  # after an error the process ends: others may not come to end it together
