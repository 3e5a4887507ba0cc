"""The result of a step on GPUs, and the times of its tasks there."""

import copy
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

from ... import _C
from .layout import StreamLayout

_LOOK_PERIOD = 200e-6  # seconds


class NotRun(NamedTuple):
    """A step for which there was no room."""

    outcome: str
    waiting: str
    error: BaseException | None = None
    failed_task: int | None = None
    begin: int = 0
    end: int = 0
    task_begin: Sequence[int] = ()
    task_end: Sequence[int] = ()
    peak_by_stage: Sequence[int] = ()
    peak_by_rank: Sequence[int] = ()


class DeviceStep:
    """A step that has been enqueued. Its times are read on first use, once it has ended.

    Times are nanoseconds since the step's begin, in each device's own clock. Reading them raises DeviceError if
    a device has failed.
    """

    waiting = ""
    begin = 0

    def __init__(self, layout: StreamLayout, result: _C.DeviceStepResult, idle: Callable[[], bool]) -> None:
        """``idle`` says whether the devices have ended all steps."""
        self._idle = idle
        self._layout = layout
        self._times = result.times
        self.outcome = result.outcome
        self.error = result.take_error()
        self.failed_task = result.failed_task
        self.num_nodes = result.num_nodes
        self.peak_by_stage = layout.peak_in_flight_of_stage
        self.peak_by_rank = layout.peak_in_flight

    @property
    def recorded(self) -> bool:
        """Whether it has times."""
        return self._times is not None

    def again(self) -> "DeviceStep":
        """The result of a replay of this step: its times have not been read yet."""
        again = copy.copy(self)
        again.__dict__.pop("_read", None)
        return again

    @cached_property
    def _read(self) -> tuple[float, list[float], list[float]]:
        times = self._times
        assert times is not None
        # Events that are done may still be those of the previous replay.
        while not (self._idle() and times.done()):
            time.sleep(_LOOK_PERIOD)
        return times.read()

    def read(self) -> None:
        """Reads the times now: the next replay overwrites them."""
        self._read  # noqa: B018

    @property
    def end(self) -> int:
        return _nanoseconds(self._read[0])

    @property
    def task_begin(self) -> Sequence[int]:
        return self._by_task(self._read[1])

    @property
    def task_end(self) -> Sequence[int]:
        return self._by_task(self._read[2])

    def _by_task(self, by_op: list[float]) -> list[int]:
        ops = map(self._layout.streams.op_of, range(len(self._layout.plan)))
        return [0 if op is None else _nanoseconds(by_op[op]) for op in ops]


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
