"""The trace of a step that several processes have run, put together by that of rank 0."""

import torch

from ..errors import PeerError
from ..processes.group import Processes, seconds
from ..report.merged import Part, merged
from ..report.trace import Trace
from ..transport import clocks
from ..transport.remote import Line

_TAG = 1 << 20  # of no message between stages


class TraceGathering:
    """Between the processes of a pipeline."""

    def __init__(self, processes: Processes, timeout: float) -> None:
        """``timeout``: seconds to wait for another process."""
        self._processes = processes
        self._timeout = seconds(timeout)

    def gather(self, trace: Trace) -> Trace | None:
        """What all processes make of theirs, in rank 0's clock; None on the other ranks.

        Raises PeerError for a process that is gone, or does not come in time.
        """
        part = Part.of(trace)
        if self._processes.rank > 0:
            self._give(part)
            return None
        return merged(trace.plan, [part, *map(self._take, range(1, self._processes.size))])

    def _give(self, part: Part) -> None:
        line = self._line(0)
        encoded = torch.frombuffer(bytearray(part.encode()), dtype=torch.uint8)
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
            encoded = torch.empty(size.item(), dtype=torch.uint8)
            line.receive(encoded).wait(self._timeout)
        except RuntimeError as error:
            raise PeerError(f"{line.name} has not given its trace: {error}") from error
        return Part.decode(encoded.numpy().tobytes()).earlier(ahead)

    def _line(self, rank: int) -> Line:
        return Line(self._processes.messages, rank, _TAG, self._processes.describe(rank))
