"""What a process uses over time, as slopes."""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

HOUR = 3600.0
WARM_UP = 0.25  # of the time, left out: caches and the allocator fill

# The most by which each may grow over a run, and beyond that in an hour.
OVER_A_RUN = {"memory": 8.0, "threads": 0.9, "descriptors": 0.9, "step": 0.3}
IN_AN_HOUR = {"memory": 8.0, "threads": 0.0, "descriptors": 0.0, "step": 0.1}


@dataclass(frozen=True)
class Sample:
    """One moment of a process.

    Attributes:
        time: seconds.
        memory: resident, MiB.
        threads: how many.
        descriptors: how many are open.
        step: the median processor time of steps since the sample before, over that of the same steps in plain
            autograd. Unlike the time on the clock it knows nothing of other programs.
    """

    time: float
    memory: float
    threads: float
    descriptors: float
    step: float


def used_now(time: float, step: float) -> Sample:
    """A sample of this process."""
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Sample(time, memory, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd")), step)


def slopes(samples: Sequence[Sample]) -> dict[str, float]:
    """Growth in an hour, by what grows: the median of the slopes between all pairs (Theil and Sen)."""
    kept = _warm(samples)
    pairs = [(a, b) for i, a in enumerate(kept) for b in kept[i + 1 :]]
    return {
        field.name: HOUR * statistics.median(
            (getattr(b, field.name) - getattr(a, field.name)) / (b.time - a.time) for a, b in pairs
        )
        for field in fields(Sample)[1:]
    }  # fmt: skip


def medians(samples: Sequence[Sample]) -> dict[str, float]:
    """What was used in the middle of the run, by what it is."""
    kept = _warm(samples)
    return {field.name: statistics.median(getattr(s, field.name) for s in kept) for field in fields(Sample)[1:]}


def too_steep(samples: Sequence[Sample]) -> list[str]:
    """What grows by more than its bound, in words."""
    hours = (samples[-1].time - _warm(samples)[0].time) / HOUR
    return [
        f"{name} grows by {slope:.3g} in an hour; at most {bound:.3g} is allowed in {hours * 60:.1f} minutes"
        for name, slope in slopes(samples).items()
        if slope * hours > (bound := OVER_A_RUN[name] + IN_AN_HOUR[name] * hours)
    ]


def _warm(samples: Sequence[Sample]) -> Sequence[Sample]:
    begin, end = samples[0].time, samples[-1].time
    return [sample for sample in samples if sample.time >= begin + WARM_UP * (end - begin)]
