"""Processes that give one another values outside of steps; where one is gone or silent, the others name it."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..base.in_time import in_time
from ..errors import PeerError
from .connections import PATIENCE, Connections
from .values import as_bytes, as_tensor, decode, encode

_GRACE = 2.0  # seconds that the first takes to tell the others who did not come


Found = TypeVar("Found")


class Circle:
    """The processes of some connections. The first hears all, and tells each what all have given.

    After a failure there may be messages on their way that nobody waits for: do not use it again.
    """

    def __init__(self, connections: Connections, timeout: float, tag: int = 0) -> None:
        """``timeout``: seconds to wait for another process. Nothing else uses ``tag`` and the next two."""
        self._connections = connections
        self._timeout = timeout
        self._tag = tag

    def of_all(self, value: bytes) -> list[bytes]:
        """The ``value`` of each process, by rank, in all of them.

        Raises PeerError, in all that are left, if a process is gone or does not come within ``timeout``.
        """
        if self._connections.rank == 0:
            return self._hear(value)
        sent = self._send(0, value)
        said = decode(self._from(0, self._timeout + _GRACE))
        del sent  # the first has taken it
        if "failed" in said:
            raise PeerError(said["failed"])
        return [bytes.fromhex(each) for each in said["values"]]

    def send(self, tensor: Tensor, rank: int) -> None:
        """Gives a contiguous tensor on the CPU to one process, which calls ``receive``.

        Raises PeerError if that is gone, or does not take it within ``timeout``.
        """
        self._awaited(
            lambda: self._connections.send([tensor], rank, self._tag + 2).wait(PATIENCE), rank, self._timeout
        )

    def receive(self, tensor: Tensor, rank: int) -> None:
        """The other side of ``send``, into a tensor of the same type and shape."""
        self._awaited(
            lambda: self._connections.recv([tensor], rank, self._tag + 2).wait(PATIENCE), rank, self._timeout
        )

    def close(self) -> None:
        """Leaves the connections open until the process ends: messages may be on their way."""
        self._connections.close(idle=False)

    def _hear(self, value: bytes) -> list[bytes]:
        others = range(1, len(self._connections.members))
        until = time.monotonic() + self._timeout
        values = [value]
        try:
            values += [self._from(rank, until - time.monotonic()) for rank in others]
        except PeerError as error:
            self._tell(encode({"failed": str(error)}), _GRACE / 2)
            raise
        self._tell(encode({"values": [each.hex() for each in values]}), self._timeout)
        return values

    def _tell(self, value: bytes, seconds: float) -> None:
        """Returns when the others have taken it, as far as they can: this process may end next."""
        sent = [work for rank in range(1, len(self._connections.members)) for work in self._send(rank, value)]

        def wait() -> None:
            for work, _ in sent:
                with contextlib.suppress(RuntimeError):
                    work.wait(PATIENCE)

        with contextlib.suppress(TimeoutError):
            in_time(wait, seconds)

    def _send(self, rank: int, value: bytes) -> list[tuple[dist.Work, Tensor]]:
        """Begins to send. What is sent to a process that is gone is lost."""
        data = as_tensor(value)
        try:
            return [
                (self._connections.send([tensor], rank, tag), tensor)
                for tag, tensor in enumerate((torch.tensor([len(data)]), data), self._tag)
            ]
        except RuntimeError as error:
            if rank == 0:
                raise self._gone(0) from error
            return []

    def _from(self, rank: int, seconds: float) -> bytes:
        def receive() -> Tensor:
            size = torch.zeros(1, dtype=torch.int64)
            self._connections.recv([size], rank, self._tag).wait(PATIENCE)
            found = torch.empty(int(size), dtype=torch.uint8)
            self._connections.recv([found], rank, self._tag + 1).wait(PATIENCE)
            return found

        return as_bytes(self._awaited(receive, rank, seconds))

    def _awaited(self, call: Callable[[], Found], rank: int, seconds: float) -> Found:
        try:
            return in_time(call, max(seconds, 0.0))
        except TimeoutError as error:
            raise PeerError(
                f"process {self._members[rank]} has not come within {self._timeout:g} seconds; is it stopped, "
                "or does it call something else?"
            ) from error
        except RuntimeError as error:
            raise self._gone(rank) from error

    def _gone(self, rank: int) -> PeerError:
        return PeerError(f"process {self._members[rank]} is gone")

    @property
    def _members(self) -> Sequence[int]:
        return self._connections.members
