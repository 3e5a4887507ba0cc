"""Calls that may never return, with a limit."""

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

Found = TypeVar("Found")


def in_time(call: Callable[[], Found], seconds: float) -> Found:
    """What ``call`` returns or raises; it runs in a daemon thread, and Ctrl-C ends the wait.

    Raises TimeoutError after so many seconds. The thread then stays in the call.
    """
    ended: SimpleQueue[tuple[Found | None, Exception | None]] = SimpleQueue()

    def run() -> None:
        try:
            ended.put((call(), None))
        except Exception as error:
            ended.put((None, error))

    threading.Thread(target=run, name="pe in time", daemon=True).start()
    try:
        found, error = ended.get(timeout=min(seconds, threading.TIMEOUT_MAX))
    except Empty:
        raise TimeoutError(f"it has not returned in {seconds:g} seconds") from None
    if error is not None:
        raise error
    return found  # type: ignore[return-value]  # None only if the call returned it
