"""Gathers the trace of a step from all its processes on rank 0."""

import torch

from ..errors import PeerError
from ..processes.group import Processes, seconds
from ..processes.values import as_bytes, as_tensor
from ..report.merged import Part, merged
from ..report.trace import Trace
from ..transport import clocks
from ..transport.remote import Line

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
        if self._processes.rank > 0:
            self._give(part)
            return None
        return merged(trace.plan, [part, *map(self._take, range(1, self._processes.size))])

    def _give(self, part: Part) -> None:
        line = self._line(0)
        encoded = as_tensor(part.encode())
        try:
            clocks.answer(line, self._timeout)
            line.send(torch.tensor([len(encoded)])).wait(self._timeout)
            line.send(encoded).wait(self._timeout)
        except RuntimeError as error:
            raise PeerError(f"{line.name} has not taken this process's trace: {error}") from error

    def _take(self, rank: int) -> Part:
        """What another rank has recorded, in this one's clock."""
        line = self._line(rank)
        try:
            ahead = clocks.ask(line, self._timeout)
            size = torch.zeros(1, dtype=torch.int64)
            line.receive(size).wait(self._timeout)
            encoded = torch.empty(int(size), dtype=torch.uint8)
            line.receive(encoded).wait(self._timeout)
        except RuntimeError as error:
            raise PeerError(f"{line.name} has not given its trace: {error}") from error
        return Part.decode(as_bytes(encoded)).earlier(ahead)

    def _line(self, rank: int) -> Line:
        return Line(self._processes.messages, rank, _TAG, self._processes.describe(rank))
