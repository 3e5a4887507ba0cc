"""The network that messages between ranks of one process can imitate, for benchmarks and tests."""

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple


class LocalLink(NamedTuple):
    """Hands messages over by reference.

    Attributes:
        overhead: seconds that the sender spends on each message besides packing it.
    """

    overhead: float = 0.0

    def send(self) -> float:
        """Called by the sender for each message; returns the seconds it took."""
        if not self.overhead:
            return 0.0
        begin = time.perf_counter()
        time.sleep(self.overhead)
        return time.perf_counter() - begin


FREE_LINK = LocalLink()

_imitated = FREE_LINK


def current_link() -> LocalLink:
    """The link for a pipeline that is made now."""
    return _imitated


@contextlib.contextmanager
def imitated_link(link: LocalLink) -> Iterator[None]:
    """Pipelines made within it send their messages through ``link``."""
    global _imitated
    before, _imitated = _imitated, link
    try:
        yield
    finally:
        _imitated = before
