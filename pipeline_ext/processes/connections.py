"""Connections between processes that end when they are closed."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from ..base.imported import is_dtensor

# What waits longest is a receive, through a whole step; the step itself says when that is too long.
_PATIENCE = timedelta(days=1)

_left: list["Connections"] = []  # as they are: to end them would be to wait for what may never come


class Connections:
    """Connections (gloo) between some processes, this one among them, for one purpose.

    They are in no list of torch's groups, which is why they can be closed in one process before another: torch
    names what is in the list by its length, and the next groups of these processes could not meet.

    Attributes:
        rank: of this process among them.
    """

    def __init__(self, store: dist.Store, members: Sequence[int], timeout: timedelta = _PATIENCE) -> None:
        """All of them, by rank as numbers in the world, open theirs together; ``store`` is for these alone."""
        self.rank = list(members).index(dist.get_rank())
        with _in_background():
            self._gloo = dist.ProcessGroupGloo(store, self.rank, len(members), timeout)

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        return self._gloo.send(tensors, rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        return self._gloo.recv(tensors, rank, tag)

    def broadcast(self, tensor: Tensor, rank: int) -> dist.Work:
        """From ``rank`` to all; of a tensor that processes share out, what each has of it."""
        return self._gloo.broadcast(own_part(tensor), rank)

    def all_reduce(self, tensor: Tensor, timeout: timedelta) -> dist.Work:
        """Makes ``tensor`` the sum of all processes', part by part as ``broadcast``."""
        return self._gloo.allreduce(own_part(tensor), timeout=timeout)

    def all_gather(self, found: list[Tensor], tensor: Tensor, timeout: timedelta) -> dist.Work:
        """Puts each process's ``tensor`` into its place in ``found``."""
        return self._gloo.allgather(found, tensor, timeout)

    def close(self, idle: bool) -> None:
        """Ends them; where they are not ``idle``, they end with the process."""
        if idle:
            self._gloo = None
        else:
            _left.append(self)


def own_part(tensor: Tensor) -> Tensor:
    """What of it is in this process, where several share it out."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


@contextlib.contextmanager
def _in_background() -> Iterator[None]:
    """Threads that begin within it interrupt no others as they wake, where the system (Linux) can see to that.

    gloo's thread tries for the lock of a connection again and again. If it has interrupted the one that holds
    the lock, a stage that sends, and has its core, neither goes on before the system's next tick, after 4 ms.
    """
    if not hasattr(os, "SCHED_BATCH") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    with contextlib.suppress(OSError):  # not every container allows it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
