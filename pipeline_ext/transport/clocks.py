"""How far two processes' clocks are apart, found out as the Network Time Protocol does."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch

from .remote import Line

_ROUNDS = 12


class RoundTrip(NamedTuple):
    """A question and its answer; nanoseconds."""

    asked: int
    answer: int  # what the other clock showed between
    answered: int


def ahead(round_trips: Sequence[RoundTrip]) -> int:
    """Nanoseconds by which the other clock is ahead, wrong by at most half of the shortest round trip."""
    best = min(round_trips, key=lambda trip: trip.answered - trip.asked)
    return best.answer - (best.asked + best.answered) // 2


def ask(line: Line, timeout: timedelta) -> int:
    """By how much the clock of the process at the other end is ahead, which calls ``answer`` meanwhile.

    Raises RuntimeError where it is gone, or does not come in time.
    """
    round_trips = []
    for _ in range(_ROUNDS):
        shown = torch.zeros(1, dtype=torch.int64)
        asked = now()
        sent, received = line.send(shown.clone()), line.receive(shown)
        sent.wait(timeout)
        received.wait(timeout)
        round_trips.append(RoundTrip(asked, shown.item(), now()))
    return ahead(round_trips)


def answer(line: Line, timeout: timedelta) -> None:
    """The other end of ``ask``."""
    for _ in range(_ROUNDS):
        line.receive(torch.zeros(1, dtype=torch.int64)).wait(timeout)
        line.send(torch.tensor([now()])).wait(timeout)


def now() -> int:
    """Nanoseconds of the clock that steps are recorded by."""
    return time.monotonic_ns()
