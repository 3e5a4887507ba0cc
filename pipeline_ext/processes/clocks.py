"""The difference between the clocks of two processes, measured as the Network Time Protocol does."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import torch

from .peer import Peer

_ROUNDS = 12


class RoundTrip(NamedTuple):
    """A question and its answer; times in nanoseconds."""

    asked: int
    answer: int  # the other clock, in between
    answered: int


def ahead(round_trips: Sequence[RoundTrip]) -> int:
    """Nanoseconds by which the other clock is ahead, wrong by at most half of the shortest round trip."""
    best = min(round_trips, key=lambda trip: trip.answered - trip.asked)
    return best.answer - (best.asked + best.answered) // 2


def ask(peer: Peer, timeout: timedelta) -> int:
    """Nanoseconds by which the peer's clock is ahead; the peer calls ``answer`` at the same time.

    Raises RuntimeError if the peer is gone or does not answer in time.
    """
    round_trips = []
    for _ in range(_ROUNDS):
        shown = torch.zeros(1, dtype=torch.int64)
        asked = now()
        sent, received = peer.send(shown.clone()), peer.recv(shown)
        sent.wait(timeout)
        received.wait(timeout)
        round_trips.append(RoundTrip(asked, int(shown), now()))
    return ahead(round_trips)


def answer(peer: Peer, timeout: timedelta) -> None:
    """The other side of ``ask``."""
    for _ in range(_ROUNDS):
        peer.recv(torch.zeros(1, dtype=torch.int64)).wait(timeout)
        peer.send(torch.tensor([now()])).wait(timeout)


def now() -> int:
    """Nanoseconds of the clock that steps are recorded by."""
    return time.monotonic_ns()
