"""Ctrl-C that waits for a safe moment."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Ctrl-C during the block takes effect at its end; for work that must not be left half done."""
    if threading.current_thread() is not threading.main_thread():  # Python interrupts no other thread
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def noted(active: bool) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; only a second press interrupts the block.

    If not ``active``, the first press interrupts it as usual.
    """
    pressed = []
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    if active:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        if active:
            signal.signal(signal.SIGINT, before)
