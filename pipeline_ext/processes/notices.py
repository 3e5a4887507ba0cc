"""Notices, by which a process reaches the others at once, whatever they are doing."""

import contextlib
import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistError

from . import values
from .store import Store, prefixed

_FOREVER = timedelta(days=1000)
_GRACE = 2.0  # seconds: a store may go away because the program ends; its watcher is then closed next

Told = Callable[[int | None, str], None]


class Notices:
    """A mailbox for each process of a group, in a store that all of them reach.

    A thread of the process waits at its mailbox, on a connection to the store that nothing else uses; it
    sleeps there until something is in it. Letters are numbered, so that none overwrites another.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int) -> None:
        """``name`` distinguishes these mailboxes in the store. This process is ``rank`` of ``size``."""
        self._store = prefixed(name, store.clone())
        self._rank = rank
        self._others = [other for other in range(size) if other != rank]
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None

    def watch(self, told: Told, status: Callable[[], str] = str) -> None:
        """Begins to read the mailbox, in a daemon thread that calls both functions.

        ``told(rank, text)`` is called for each notice; ``rank`` is the sender, or None if the store has gone.
        ``status()`` is this process's answer to ``ask``. Neither may keep this object alive.
        """
        self._watcher = threading.Thread(
            target=_read,
            args=(self._store.clone(), self._rank, self._closed, told, status),
            name="pe notices",
            daemon=True,
        )
        self._watcher.start()

    def tell(self, text: str) -> None:
        """Puts ``text`` into the mailboxes of all others. If the store is gone, they notice that themselves."""
        with contextlib.suppress(DistError):
            for other in self._others:
                self._write(other, {"from": self._rank, "text": text})

    def ask(self, within: float) -> dict[int, str]:
        """Asks the others for their status. Returns, by rank, the answers within this many seconds."""
        with contextlib.suppress(DistError):
            question = f"question {self._store.add('questions', 1)}"
            answers = {other: f"{question}/{other}" for other in self._others}
            for other in self._others:
                self._write(other, {"question": question})
            with contextlib.suppress(DistError):  # some do not answer
                self._store.wait(list(answers.values()), timedelta(seconds=within))
            return {
                other: self._store.get(key).decode()
                for other, key in answers.items()
                if self._store.check([key])
            }
        return {}

    def close(self) -> None:
        """Ends the thread, and the connection to the store."""
        if self._closed.is_set():
            return
        self._closed.set()
        with contextlib.suppress(DistError):
            self._write(self._rank, {})
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(_GRACE)
        del self._store  # which ends the connection

    def _write(self, rank: int, letter: dict[str, Any]) -> None:
        self._store.set(f"{rank}/{self._store.add(f'{rank}', 1)}", values.encode(letter))


def _read(store: Store, rank: int, closed: threading.Event, told: Told, status: Callable[[], str]) -> None:
    """Reads a mailbox until it is closed."""
    try:
        for number in itertools.count(1):
            key = f"{rank}/{number}"
            store.wait([key], _FOREVER)
            if closed.is_set():
                return
            letter = values.decode(store.get(key))
            if "question" in letter:
                store.set(f"{letter['question']}/{rank}", status())
            else:
                told(letter["from"], letter["text"])
    except DistError as error:
        if not closed.wait(_GRACE):
            told(None, f"the store of torch.distributed has gone: {error}")
