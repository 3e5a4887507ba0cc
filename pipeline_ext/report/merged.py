"""One trace of a step, from what each of the processes that ran it has recorded."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from .. import _C
from ..plan.records import Messages
from .trace import Trace


class Part(NamedTuple):
    """What the process of one rank has recorded: plain numbers, times in nanoseconds of one clock."""

    begin: int
    end: int
    tasks: list[tuple[int, int, int]]  # of this rank: number in the plan, begin and end
    peak_by_rank: list[int]
    peak_by_stage: list[int]
    messages: list[Messages]  # that it has sent
    reductions: list[tuple[int, int, int, int]]  # stage, begin, end, bytes

    @classmethod
    def of(cls, trace: Trace) -> "Part":
        record = trace.record
        tasks = zip(range(len(trace.plan)), record.task_begin, record.task_end)
        return cls(
            record.begin,
            record.end,
            [times for times in tasks if times[-1]],
            record.peak_by_rank,
            record.peak_by_stage,
            trace.messages,
            [
                (r.stage, record.begin + round(r.begin * 1e9), record.begin + round(r.end * 1e9), r.nbytes)
                for r in trace.reductions
            ],
        )

    def earlier(self, by: int) -> "Part":
        """With all times so many nanoseconds earlier."""
        return self._replace(
            begin=self.begin - by,
            end=self.end - by,
            tasks=[(task, begin - by, end - by) for task, begin, end in self.tasks],
            reductions=[(stage, begin - by, end - by, n) for stage, begin, end, n in self.reductions],
        )

    def encode(self) -> bytes:
        """For ``decode``, in another process."""
        return json.dumps(self).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> "Part":
        part = cls(*json.loads(encoded))
        return part._replace(messages=[Messages(*sent) for sent in part.messages])


class _Record(NamedTuple):
    """A ``StepRecord``."""

    begin: int
    end: int
    task_begin: list[int]
    task_end: list[int]
    peak_by_stage: list[int]
    peak_by_rank: list[int]


def merged(plan: _C.Plan, parts: Sequence[Part]) -> Trace:
    """The trace of a step from what its ranks have recorded, by rank, in one clock.

    It begins where the process did that ran the first task: others may have come early and waited.
    """
    task_begin, task_end = [0] * len(plan), [0] * len(plan)
    for part in parts:
        for task, begin, end in part.tasks:
            task_begin[task], task_end[task] = begin, end
    first = min(parts, key=lambda part: min(begin for _, begin, _ in part.tasks))
    record = _Record(
        first.begin,
        max(part.end for part in parts),
        task_begin,
        task_end,
        [parts[rank].peak_by_stage[stage] for stage, rank in enumerate(plan.rank_of_stage)],
        [part.peak_by_rank[rank] for rank, part in enumerate(parts)],
    )
    trace = Trace(plan, record, sorted((sent for part in parts for sent in part.messages), key=_place))
    trace.add_reductions(times for part in parts for times in part.reductions)
    return trace


def _place(sent: Messages) -> tuple[str, bool, int]:
    """Where they come in a trace."""
    return sent.skip or "", sent.direction == "backward", sent.boundary
