"""Connections between processes that end when they are closed."""

import contextlib
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..base.imported import is_dtensor
from ..base.in_time import in_time
from ..errors import PeerError, StepTimeout
from .store import Store, asked

# A receive may wait through a whole step, and the step itself decides when that is too long.
PATIENCE = timedelta(days=1)
_GRACE = 1.0  # seconds beside the limit of gloo, which waits for the others by itself

_left: list["Connections"] = []  # left open: closing them could wait for messages that never come


class Connections:
    """Connections (gloo) between some processes, this one among them, for one purpose.

    torch does not list them among its groups, so one process can close them before another does: torch names a
    listed group by the length of the list, and these processes' next groups would get different names.

    Attributes:
        members: by rank, as numbers in the world.
        rank: of this process among them.
    """

    def __init__(self, store: Store, members: Sequence[int], timeout: timedelta) -> None:
        """All ``members`` open theirs together, within ``timeout``; ``store`` is used for nothing else.

        That is the limit of all that they do together, too. Raises PeerError, which names members that did
        not come; StepTimeout if the store does not answer.
        """
        self.members = list(members)
        self.rank = self.members.index(dist.get_rank())

        def connect() -> Any:
            _go_to_the_background()
            # torch has no type stubs for what a gloo group can do.
            return dist.ProcessGroupGloo(store, self.rank, len(members), timeout)  # type: ignore[arg-type]

        limit = timeout.total_seconds()
        asked(lambda: store.set(f"here/{self.rank}", ""), limit)
        try:
            self._gloo = in_time(connect, limit + _GRACE)  # which waits in the store without a limit
        except (TimeoutError, RuntimeError) as error:
            raise PeerError(f"{_who(store, self.members)}: {error}") from error

    @property
    def others(self) -> str:
        """The other processes in words, for people."""
        return f"process {', '.join(str(m) for rank, m in enumerate(self.members) if rank != self.rank)}"

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        return self._gloo.send(tensors, rank, tag)

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> dist.Work:
        return self._gloo.recv(tensors, rank, tag)

    def broadcast(self, tensor: Tensor, rank: int) -> dist.Work:
        """Sends ``tensor`` from ``rank`` to all; for a DTensor, each process's own part."""
        return self._gloo.broadcast(own_part(tensor), rank)

    def make_equal(self, tensor: Tensor) -> None:
        """Gives ``tensor`` the values that it has in the first, as ``broadcast`` does.

        Raises PeerError if a process is gone, or does not come in time.
        """
        try:
            self.broadcast(tensor, 0).wait()
        except RuntimeError as error:
            raise PeerError(f"weights cannot be made equal with those of {self.others}: {error}") from error

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


def _who(store: Store, members: Sequence[int]) -> str:
    """Who did not come, in words."""

    def find() -> list[int]:
        return [member for rank, member in enumerate(members) if not store.check([f"here/{rank}"])]

    try:
        absent = asked(find, 0.0)
    except (PeerError, StepTimeout) as error:
        return f"the processes cannot connect: {error}"
    if not absent:
        return f"the processes {', '.join(map(str, members))} cannot connect"
    return f"process {', '.join(map(str, absent))} did not come to connect"


def own_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is in this process; any other tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def _go_to_the_background() -> None:
    """Lets this thread, and those that it starts, preempt no other when they wake, if the system can (Linux).

    gloo's thread tries again and again to take the lock of a connection. If it has preempted the stage that
    holds the lock, on the same core, both stand still until the next timer tick, up to 4 ms later.
    """
    if hasattr(os, "SCHED_BATCH") and os.sched_getscheduler(0) == os.SCHED_OTHER:
        with contextlib.suppress(OSError):  # not every container allows it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
