"""Joins what the processes of a pipeline have recorded of a step into one trace."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from .. import _C
from ..plan.records import Messages, ReductionTimes
from .trace import Trace


class Part(NamedTuple):
    """What the process of one rank has recorded. Times are nanoseconds of one clock."""

    begin: int
    end: int
    tasks: list[tuple[int, int, int]]  # of this rank: number in the plan, begin, end
    peak_by_rank: list[int]
    peak_by_stage: list[int]
    messages: list[Messages]  # that it has sent
    reductions: list[ReductionTimes]
    act_memory: list[int] | None

    @classmethod
    def of(cls, trace: Trace) -> "Part":
        record = trace.record
        tasks = zip(range(len(trace.plan)), record.task_begin, record.task_end)
        return cls(
            record.begin,
            record.end,
            [times for times in tasks if times[-1]],
            list(record.peak_by_rank),
            list(record.peak_by_stage),
            trace.messages,
            [
                ReductionTimes(
                    r.stage, record.begin + round(r.begin * 1e9), record.begin + round(r.end * 1e9), r.nbytes
                )
                for r in trace.reductions
            ],
            trace.act_memory,
        )

    def earlier(self, by: int) -> "Part":
        """The same with all times ``by`` nanoseconds earlier."""
        return self._replace(
            begin=self.begin - by,
            end=self.end - by,
            tasks=[(task, begin - by, end - by) for task, begin, end in self.tasks],
            reductions=[r._replace(begin=r.begin - by, end=r.end - by) for r in self.reductions],
        )

    def encode(self) -> bytes:
        """Bytes that ``decode`` reads in another process."""
        return json.dumps(self).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> "Part":
        part = cls(*json.loads(encoded))
        return part._replace(
            messages=[Messages(*sent) for sent in part.messages],
            reductions=[ReductionTimes(*times) for times in part.reductions],
        )


class _Record(NamedTuple):
    """A ``StepRecord``."""

    begin: int
    end: int
    task_begin: list[int]
    task_end: list[int]
    peak_by_stage: list[int]
    peak_by_rank: list[int]


def merged(plan: _C.Plan, parts: Sequence[Part]) -> Trace:
    """The trace of a step from the records of its ranks; ``parts`` are by rank, in one clock.

    It begins when the process that ran the first task began: others may have started early and waited.
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
    trace = Trace(plan, record, sorted((sent for part in parts for sent in part.messages), key=_by_direction))
    measured = [part.act_memory for part in parts if part.act_memory is not None]
    if len(measured) == len(parts):
        trace.act_memory = [measured[rank][stage] for stage, rank in enumerate(plan.rank_of_stage)]
    trace.add_reductions(times for part in parts for times in part.reductions)
    return trace


def _by_direction(sent: Messages) -> tuple[str, bool, int]:
    """Sort key: skip connections last, forward before backward, then by boundary."""
    return sent.skip or "", sent.direction == "backward", sent.boundary
