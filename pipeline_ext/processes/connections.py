"""Connections between processes that end when they are closed."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..base.imported import is_dtensor
from .store import Store

# A receive may wait through a whole step, and the step itself decides when that is too long.
_PATIENCE = timedelta(days=1)

_left: list["Connections"] = []  # left open: closing them could wait for messages that never come


class Connections:
    """Connections (gloo) between some processes, this one among them, for one purpose.

    torch does not list them among its groups, so one process can close them before another does: torch names a
    listed group by the length of the list, and these processes' next groups would get different names.

    Attributes:
        members: by rank, as numbers in the world.
        rank: of this process among them.
    """

    def __init__(self, store: Store, members: Sequence[int], timeout: timedelta = _PATIENCE) -> None:
        """All ``members`` open theirs together; ``store`` is used for nothing else."""
        self.members = list(members)
        self.rank = self.members.index(dist.get_rank())
        with _in_background():
            # torch has no type stubs for what a gloo group can do.
            self._gloo: Any = dist.ProcessGroupGloo(store, self.rank, len(members), timeout)  # type: ignore[arg-type]

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        return self._gloo.send(tensors, rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        return self._gloo.recv(tensors, rank, tag)

    def broadcast(self, tensor: Tensor, rank: int) -> dist.Work:
        """Sends ``tensor`` from ``rank`` to all; for a DTensor, each process's own part."""
        return self._gloo.broadcast(own_part(tensor), rank)

    def all_reduce(self, tensor: Tensor, timeout: timedelta) -> dist.Work:
        """Makes ``tensor`` the sum of all processes' tensors; for a DTensor, of their own parts."""
        return self._gloo.allreduce(own_part(tensor), timeout=timeout)

    def all_gather(self, found: list[Tensor], tensor: Tensor, timeout: timedelta) -> dist.Work:
        """Puts each process's ``tensor`` into its place in ``found``."""
        return self._gloo.allgather(found, tensor, timeout)

    def close(self, idle: bool) -> None:
        """Closes them; unless they are ``idle``, they stay open until the process ends."""
        if idle:
            self._gloo = None
        else:
            _left.append(self)


def own_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is in this process; any other tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


@contextlib.contextmanager
def _in_background() -> Iterator[None]:
    """Threads started inside it preempt no other thread when they wake, if the system can do that (Linux).

    gloo's thread tries again and again to take the lock of a connection. If it has preempted the stage that
    holds the lock, on the same core, both stand still until the next timer tick, up to 4 ms later.
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
