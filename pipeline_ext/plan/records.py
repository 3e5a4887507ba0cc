"""Records of a step, measured or simulated: tasks, messages, reductions. Reports are made from them."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .. import _C


class TaskRecord(NamedTuple):
    """One task of a step. Times count from its begin: in seconds, or if simulated in the unit of the costs."""

    task: int  # its number in the plan
    action: str
    kind: str
    stage: int
    microbatch: int  # -1: the action is of the whole stage
    rank: int
    stream: str  # "forward" or "backward"
    begin: float
    end: float


class ReductionRecord(NamedTuple):
    """One buffer of gradients averaged over replicas. Times count from the step's begin, in seconds."""

    stage: int  # -1: parameters that several stages hold
    begin: float  # when the buffer was sent
    end: float  # when it held the mean
    nbytes: int


class ReductionTimes(NamedTuple):
    """One buffer of gradients averaged over replicas. Times are nanoseconds of the steady clock."""

    stage: int  # -1: parameters that several stages hold
    begin: int
    end: int
    nbytes: int


def task_records(plan: _C.Plan, begin: Sequence[float], end: Sequence[float]) -> list[TaskRecord]:
    """A record of each task, in the order in which they begin; ``begin`` and ``end`` are by task."""
    records = [
        TaskRecord(task, plan.action(task), *plan.describe(task), *times)
        for task, times in enumerate(zip(begin, end, strict=True))
    ]
    return sorted(records, key=lambda record: record.begin)


def lanes(plan: _C.Plan, tasks: Sequence[TaskRecord]) -> list[int]:
    """The part of its rank's row in which to draw each task: 0: all of it.

    If two tasks run at once (streams, or an overlapped pair): 1, the upper half, for the task of the forward
    stream, and 2, the lower half, for that of the backward stream.
    """

    def slot(task: TaskRecord) -> tuple[int, float, float]:
        return task.rank, task.begin, task.end

    there = Counter(slot(task) for task in tasks if task.begin < task.end)
    return [1 + (task.stream == "backward") if plan.overlap or there[slot(task)] > 1 else 0 for task in tasks]


class StepRecord(Protocol):
    """When a step and its tasks ran, in nanoseconds of one clock, and the most microbatches alive at once."""

    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def task_begin(self) -> Sequence[int]: ...  # by task
    @property
    def task_end(self) -> Sequence[int]: ...
    @property
    def peak_by_stage(self) -> Sequence[int]: ...
    @property
    def peak_by_rank(self) -> Sequence[int]: ...


class Messages(NamedTuple):
    """The messages across one boundary in one direction in one step."""

    boundary: int  # between this stage and the next
    direction: str  # "forward": activations, "backward": gradients
    count: int  # type: ignore[assignment]  # hides the method of tuples, which nobody needs here
    packed_nbytes: int  # 0 if the results were passed by reference
    result_nbytes: int  # of the first microbatch
    seconds: float  # that sending took
    skip: str | None = None  # name of the skip connection that they belong to
