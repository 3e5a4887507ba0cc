"""When the backwards of a step have ended, stage by stage."""

import threading
from collections.abc import Callable, Iterable

Body = Callable[[int], None]


class Endings:
    """Calls ``ended(stage)`` once in a step for each of ``stages``, when its last backward has ended.

    In descending order, whichever stage ends first, and one call at a time: what replicas exchange is to be
    in the same order in all of them. It is called in the thread of the backward that made it possible.
    """

    def __init__(self, stages: Iterable[int], ended: Callable[[int], None]) -> None:
        self._stages = sorted(stages)
        self._ended = ended
        self._left: dict[int, int] = {}
        self._due: list[int] = []
        self._calling = threading.Lock()

    def begin(self, microbatches: int) -> None:
        """Begins a step in which each stage runs so many backwards."""
        self._left = dict.fromkeys(self._stages, microbatches)
        self._due = list(self._stages)

    def pause(self) -> None:
        """Begins a step in which nothing is called."""
        self._left, self._due = {}, []

    def watch(self, stage: int, backward: Body) -> Body:
        """``backward`` of a stage: B, or W where that is split."""

        def watched(m: int) -> None:
            backward(m)
            self._count(stage)

        return watched

    def _count(self, stage: int) -> None:
        if stage not in self._left:
            return
        self._left[stage] -= 1
        if self._left[stage] == 0:
            with self._calling:
                while self._due and self._left[self._due[-1]] == 0:
                    self._ended(self._due.pop())
