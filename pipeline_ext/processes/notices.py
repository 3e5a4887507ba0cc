"""Notices, by which a process reaches the others at once, whatever they are doing."""

import contextlib
import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import DistError

from ..base.in_time import in_time
from . import values
from .store import Store, asked, prefixed

_FOREVER = timedelta(days=1000)
_PATIENCE = 0.4  # seconds: a store whose host is stopped, or cut off, answers nobody and fails nowhere
_GRACE = 2.0  # seconds: a store may go away because the program ends; its watcher is then closed next

Told = Callable[[int | None, str], None]


class Notices:
    """A mailbox for each process of a group, in a store that all of them reach.

    A thread of the process waits at its mailbox, on a connection to the store that nothing else uses; it
    sleeps there until something is in it. Letters are numbered, so that none overwrites another.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int, timeout: float) -> None:
        """``name`` distinguishes these mailboxes in the store. This process is ``rank`` of ``size``.

        Raises PeerError if the store has gone, StepTimeout if it does not answer within ``timeout`` seconds.
        """

        def connect() -> list[Store]:
            return [prefixed(name, store.clone()) for _ in range(2)]

        self._store, self._mailbox = asked(connect, timeout)
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
            args=(self._mailbox, self._rank, self._closed, told, status),
            name="pe notices",
            daemon=True,
        )
        self._watcher.start()

    def tell(self, text: str) -> None:
        """Puts ``text`` into the mailboxes of all others. If the store is gone, they notice that themselves."""

        def write() -> None:
            for other in self._others:
                self._write(other, {"from": self._rank, "text": text})

        with contextlib.suppress(DistError, TimeoutError):
            in_time(write, _PATIENCE)

    def ask(self, within: float) -> dict[int, str] | None:
        """Asks the others for their status. Returns, by rank, the answers within this many seconds.

        None: the store, through which all ask and answer, gives no answer itself.
        """
        try:
            return in_time(lambda: self._ask(within), within + _PATIENCE)
        except (DistError, TimeoutError):
            return None

    def _ask(self, within: float) -> dict[int, str]:
        question = f"question {self._store.add('questions', 1)}"
        answers = {other: f"{question}/{other}" for other in self._others}
        for other in self._others:
            self._write(other, {"question": question})
        with contextlib.suppress(DistError):  # some do not answer
            self._store.wait(list(answers.values()), timedelta(seconds=within))
        return {
            other: self._store.get(key).decode() for other, key in answers.items() if self._store.check([key])
        }

    def close(self) -> None:
        """Ends the thread, and the connection to the store."""
        if self._closed.is_set():
            return
        self._closed.set()
        try:
            in_time(lambda: self._write(self._rank, {}), _PATIENCE)
            if self._watcher is not None and self._watcher is not threading.current_thread():
                self._watcher.join(_GRACE)
        except (DistError, TimeoutError):
            pass  # nobody wakes the thread, which ends with the process
        del self._store, self._mailbox  # which ends the connections

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
