"""Trains in one process, then in two, for some minutes; names wrong steps and what grows.

A failure ends two processes, and others go on from the checkpoint, as under torchrun.
In ``tests``: ``python -m soak.run --minutes 30``.
"""

import argparse
import sys
import tempfile
import time

import torch.distributed as dist
from processes import run

from .slopes import medians, slopes, too_steep
from .training import Course, train

PATIENCE = 300.0  # seconds beyond the time


def main() -> int:
    """Exit status 1 if a step was wrong or a slope is too steep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes",
        type=float,
        default=30.0,
        help="a half for one process, the rest for two: a half of it without failures",
    )
    parser.add_argument("--seed", type=int, help="the time if not given")
    options = parser.parse_args()
    seed = time.time_ns() % 2**32 if options.seed is None else options.seed
    print(f"seed {seed}")
    faults = [*_one(options.minutes * 30, seed), *_two(options.minutes * 15, seed)]
    for fault in faults:
        print(f"FAULT {fault}")
    return bool(faults)


def _one(seconds: float, seed: int) -> list[str]:
    """What was wrong in a process that trains through failures."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        courses = run(1, alone, seconds, seed, folder, timeout=seconds + PATIENCE)
    return _told("one process", courses)


def _two(seconds: float, seed: int) -> list[str]:
    """What was wrong in two processes without failures, and in pairs of them that each end by one."""
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        faults = _told("two processes", _together(seconds, seed, folder, False))
        end = time.monotonic() + seconds
        pairs, total = 0, Course()
        while (left := end - time.monotonic()) > 0:
            pairs += 1
            for course in _together(left, seed + pairs, folder, True):
                total.steps += course.steps
                total.wrong += course.wrong
                total.events += course.events
    print(f"two processes that were started again {pairs} times: {_counts(total)}")
    return faults + total.wrong


def _together(seconds: float, seed: int, folder: str, failures: bool) -> list[Course]:
    return run(2, train, seconds, seed, folder, failures, timeout=seconds + PATIENCE)


def _told(who: str, courses: list[Course]) -> list[str]:
    """Prints what became of processes; returns what was wrong."""
    faults = []
    for course in courses:
        print(f"{who}: {_counts(course)}")
        usual = medians(course.samples)
        for name, slope in slopes(course.samples).items():
            print(f"    {name:12} {usual[name]:8.2f}, {slope:+.3g} in an hour")
        faults += [*course.wrong, *too_steep(course.samples)]
    return [f"{who}: {fault}" for fault in faults]


def _counts(course: Course) -> str:
    events = ", ".join(f"{count} {event}" for event, count in sorted(course.events.items()))
    return f"{course.steps} steps, {len(course.wrong)} wrong; {events}"


def alone(seconds: float, seed: int, folder: str) -> Course:
    """Trains in a process that knows of no other."""
    dist.destroy_process_group()
    return train(seconds, seed, folder, True)


if __name__ == "__main__":
    sys.exit(main())
