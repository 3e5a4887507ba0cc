"""When the tasks of a step ran, or would run: what every report is made from."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .. import _C


class TaskRecord(NamedTuple):
    """One task of a step. Times count from the step's begin: seconds, or simulated the costs' unit."""

    task: int  # its number in the plan
    action: str
    kind: str
    stage: int
    microbatch: int  # -1: the action concerns the whole stage
    rank: int
    stream: str  # "forward" or "backward"
    begin: float
    end: float


class ReductionRecord(NamedTuple):
    """One buffer of gradients, averaged between replicas. Times count from the step's begin, in seconds."""

    stage: int  # -1: parameters that several stages hold
    begin: float  # when the buffer went out
    end: float  # when it held the mean
    nbytes: int


class ReductionTimes(NamedTuple):
    """One buffer of gradients as it was averaged: nanoseconds of the steady clock."""

    stage: int  # -1: parameters that several stages hold
    begin: int
    end: int
    nbytes: int


def task_records(plan: _C.Plan, begin: Sequence[float], end: Sequence[float]) -> list[TaskRecord]:
    """A record of each task, in the order in which they began; ``begin`` and ``end`` are by task."""
    records = [
        TaskRecord(task, plan.action(task), *plan.describe(task), *times)
        for task, times in enumerate(zip(begin, end, strict=True))
    ]
    return sorted(records, key=lambda record: record.begin)


def lanes(plan: _C.Plan, tasks: Sequence[TaskRecord]) -> list[int]:
    """Where each task lies in its rank's row: 0, all of it; where streams, or the parts of a pair, run together
    1, the upper half, for the forward one and 2, the lower half, for the backward one."""

    def place(task: TaskRecord) -> tuple[int, float, float]:
        return task.rank, task.begin, task.end

    there = Counter(place(task) for task in tasks if task.begin < task.end)
    return [1 + (task.stream == "backward") if plan.overlap or there[place(task)] > 1 else 0 for task in tasks]


class StepRecord(Protocol):
    """When a step and its tasks ran, in nanoseconds of one clock, and what was alive at once."""

    begin: int
    end: int
    task_begin: Sequence[int]  # by task
    task_end: Sequence[int]
    peak_by_stage: list[int]  # microbatches in flight
    peak_by_rank: list[int]


class Messages(NamedTuple):
    """What crossed a boundary in one direction in one step."""

    boundary: int  # between this stage and the next
    direction: str  # "forward": activations, "backward": gradients
    count: int
    packed_nbytes: int  # 0 where the results were handed over
    result_nbytes: int  # of the first microbatch
    seconds: float  # that the link spent on them
    skip: str | None = None  # its name, where they went on from there to a stage further away
