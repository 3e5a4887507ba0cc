"""How many threads a pipeline's ranks share: one each, or one for all where measured to be faster.

Threads of one Python process hand the interpreter's lock to one another at every torch operation. Where
operations are short that costs more than running side by side gains.
"""

from collections import defaultdict

_TRIES = 4  # steps on each number of threads, after one that warms up
_SMALL = 500e-6  # seconds of a step for each of its tasks, from which on nothing else is tried


class ThreadChoice:
    """Picks the number of threads for each step, and learns from what it took.

    Each size of batch has a choice of its own, made in its first steps.
    """

    def __init__(self, tasks: int, most: int, *, fixed: bool) -> None:
        self._tasks = tasks
        self._most = most
        self._fixed = fixed or most == 1
        self._seconds: dict[int, list[float]] = defaultdict(list)  # by batch size, of its first steps
        self._chosen: dict[int, int] = {}  # by batch size

    def threads(self, size: int) -> int:
        """For the next step, of a batch of ``size`` rows."""
        if self._fixed:
            return self._most
        if size in self._chosen:
            return self._chosen[size]
        return self._most if len(self._seconds[size]) % 2 == 0 else 1

    def took(self, size: int, seconds: float) -> None:
        """The step, run on as many threads as ``threads`` said, took so long."""
        if self._fixed or size in self._chosen:
            return
        measured = self._seconds[size]
        measured.append(seconds)
        if seconds > self._tasks * _SMALL:
            self._chosen[size] = self._most
        elif len(measured) == 2 * _TRIES + 1:
            one, most = min(measured[1::2]), min(measured[2::2])
            self._chosen[size] = 1 if one < most else self._most
        else:
            return
        del self._seconds[size]
