"""Notices the last backward of each stage in a step."""

import threading
from collections.abc import Callable, Iterable

Body = Callable[[int], None]


class LastBackward:
    """Calls ``ended(stage)`` once in a step for each of ``stages``, when its last backward has ended.

    Calls are made one at a time, in descending order of the stages, whichever ends first: replicas must
    exchange their gradients in one order. Each call runs in the thread of the backward that made it possible.
    """

    def __init__(self, stages: Iterable[int], ended: Callable[[int], None]) -> None:
        self._stages = sorted(stages)
        self._ended = ended
        self._remaining: dict[int, int] = {}  # backwards, by stage
        self._due: list[int] = []  # stages not yet called
        self._calling = threading.Lock()

    def begin(self, microbatches: int) -> None:
        """Begins a step in which each stage runs this many backwards."""
        self._remaining = dict.fromkeys(self._stages, microbatches)
        self._due = list(self._stages)

    def pause(self) -> None:
        """Begins a step in which nothing is called."""
        self._remaining, self._due = {}, []

    def watch(self, stage: int, backward: Body) -> Body:
        """Wraps ``backward`` of a stage: ``B``, or ``W`` if the backward is split."""

        def watched(m: int) -> None:
            backward(m)
            self._count(stage)

        return watched

    def _count(self, stage: int) -> None:
        if stage not in self._remaining:
            return
        self._remaining[stage] -= 1
        if self._remaining[stage] == 0:
            with self._calling:
                while self._due and self._remaining[self._due[-1]] == 0:
                    self._ended(self._due.pop())
