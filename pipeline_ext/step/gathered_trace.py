"""Gathers the trace of a step from all its processes on rank 0."""

import torch

from ..errors import PeerError
from ..processes import clocks
from ..processes.group import Processes, seconds
from ..processes.peer import Peer
from ..processes.values import as_bytes, as_tensor, encode
from ..report.merged import Part, merged
from ..report.trace import Trace

_TAG = 1 << 20  # no message between stages has it


class TraceGathering:
    """Gathers traces from the processes of a pipeline."""

    def __init__(self, processes: Processes, timeout: float) -> None:
        """``timeout``: seconds to wait for another process."""
        self._processes = processes
        self._timeout = seconds(timeout)

    def gather(self, trace: Trace) -> Trace | None:
        """One trace of all processes' tasks, in rank 0's clock; None on the other ranks.

        Raises PeerError if a process is gone, or does not come in time.
        """
        part = Part.of(trace)
        self._processes.circle.of_all(encode(None))  # which names a process that does not come, in all others
        if self._processes.rank > 0:
            self._give(part)
            return None
        return merged(trace.plan, [part, *map(self._take, range(1, self._processes.size))])

    def _give(self, part: Part) -> None:
        peer = self._peer(0)
        encoded = as_tensor(part.encode())
        try:
            clocks.answer(peer, self._timeout)
            peer.send(torch.tensor([len(encoded)])).wait(self._timeout)
            peer.send(encoded).wait(self._timeout)
        except RuntimeError as error:
            raise PeerError(f"{peer.name} has not taken this process's trace: {error}") from error

    def _take(self, rank: int) -> Part:
        """What another rank recorded, in this rank's clock."""
        peer = self._peer(rank)
        try:
            ahead = clocks.ask(peer, self._timeout)
            size = torch.zeros(1, dtype=torch.int64)
            peer.recv(size).wait(self._timeout)
            encoded = torch.empty(int(size), dtype=torch.uint8)
            peer.recv(encoded).wait(self._timeout)
        except RuntimeError as error:
            raise PeerError(f"{peer.name} has not given its trace: {error}") from error
        return Part.decode(as_bytes(encoded)).earlier(ahead)

    def _peer(self, rank: int) -> Peer:
        return Peer(self._processes.messages, rank, _TAG, self._processes.describe(rank))
