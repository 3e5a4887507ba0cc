"""One trace of a step, from what each of the processes that ran it has recorded."""

import json
from collections.abc import Sequence
from typing import NamedTuple

from .. import _C
from ..transport.exchange import Messages
from .trace import Trace


class Part(NamedTuple):
    """What the process of one rank has recorded: plain numbers, times in nanoseconds of its own clock."""

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


def merged(plan: _C.Plan, parts: Sequence[Part], ahead: Sequence[int]) -> Trace:
    """The trace of a step whose ranks recorded ``parts``, in the clock of rank 0.

    It begins where the process did that ran the first task: others may have come early and waited.

    Args:
        parts: by rank.
        ahead: by rank, nanoseconds by which its clock is ahead of rank 0's.
    """
    task_begin, task_end = [0] * len(plan), [0] * len(plan)
    for part, offset in zip(parts, ahead, strict=True):
        for task, begin, end in part.tasks:
            task_begin[task], task_end[task] = begin - offset, end - offset

    def first_task(rank: int) -> int:
        return min(begin for _, begin, _ in parts[rank].tasks) - ahead[rank]

    first = min(range(len(parts)), key=first_task)
    record = _Record(
        parts[first].begin - ahead[first],
        max(part.end - offset for part, offset in zip(parts, ahead)),
        task_begin,
        task_end,
        [parts[rank].peak_by_stage[stage] for stage, rank in enumerate(plan.rank_of_stage)],
        [part.peak_by_rank[rank] for rank, part in enumerate(parts)],
    )
    messages = [sent for part in parts for sent in part.messages]
    trace = Trace(plan, record, sorted(messages, key=lambda m: (m.skip or "", m.direction, m.boundary)))
    trace.add_reductions(
        (stage, begin - offset, end - offset, nbytes)
        for part, offset in zip(parts, ahead)
        for stage, begin, end, nbytes in part.reductions
    )
    return trace
