"""The processes that torchrun started for a command."""

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..lm.team import Team


def processes() -> int:
    """The number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processes_here() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def team() -> Iterator[Team]:
    """Connects all processes; without torchrun this process alone."""
    if processes() == 1:
        yield Team()
        return
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's own store outlives a start, and holds addresses of processes that are gone; a prefix hides
        # them. Any other is new for each start. The count is of one node's starts: those of others may differ.
        store = PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    yield Team(dist.group.WORLD)
    dist.destroy_process_group()  # not after an error: the others may not come to it
