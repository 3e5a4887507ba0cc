"""Notices when a pipeline's steps take another time than they did, or than was promised."""

import statistics

STEPS = 20  # in which the median is taken; all processes look after as many steps
TOLERANCE = 0.10


class Drift:
    """Compares the median of every 20 steps with what a choice has promised.

    A simulation leaves something out, so a promise may be missed by the same share for ever. If a choice that
    was made anew misses its promise in its first 20 steps, later ones are compared with those. Each choice made
    anew doubles the steps before the next, so that there are few in any run.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._promised = 0.0
        self._reference: float | None = None  # None: until the first 20 steps have run
        self._choices = 0
        self._looks = 0  # since the last choice

    def begin(self, promised: float) -> None:
        """A choice was made, by which a step should take so many seconds."""
        self._seconds.clear()
        self._promised = promised
        self._reference = None
        self._choices += 1
        self._looks = 0

    def add(self, seconds: float) -> None:
        """A step took so many seconds."""
        self._seconds.append(seconds)

    @property
    def due(self) -> bool:
        """Whether to look now."""
        return len(self._seconds) >= STEPS

    def look(self) -> str | None:
        """What has changed in these 20 steps, in words, if that is a reason to choose anew."""
        took = statistics.median(self._seconds)
        if self._reference is None:
            met = _near(took, self._promised)
            self._reference = self._promised if met or self._choices == 1 else took
        if _near(took, self._reference) or self._looks + 1 < 2 ** (self._choices - 1):
            return None
        reference = self._reference
        which = "promised" if reference == self._promised else "after the last choice"
        change = took / reference - 1.0 if reference else 1.0
        return (
            f'schedule="auto": a step takes {took * 1e3:.2f} ms, {abs(change):.0%} '
            f"{'more' if change > 0 else 'less'} than the {reference * 1e3:.2f} ms {which}; steps are measured "
            "and a schedule is chosen anew"
        )

    def looked(self) -> None:
        """Begins the next 20 steps."""
        self._seconds.clear()
        self._looks += 1


def _near(seconds: float, reference: float) -> bool:
    return abs(seconds - reference) <= TOLERANCE * reference
