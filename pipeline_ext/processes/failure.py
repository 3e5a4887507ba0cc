"""Stops the processes of a pipeline when one of them fails."""

import threading
from typing import Protocol

import torch.distributed as dist

from ..errors import PeerError, StepTimeout
from .notices import Notices
from .store import SILENT

GRACE = 1.0  # seconds to wait for the reason why a process is gone; replicas wait longer


class Executor(Protocol):
    """Runs a step."""

    def fail(self, error: Exception) -> object:
        """Stops the step; any thread may call it."""


class Failure:
    """The failure of one of a pipeline's processes. If it is this one, the others are told."""

    def __init__(self, notices: Notices, everyone: list[int]) -> None:
        """``everyone``: the processes that ``notices`` reach and this one, as numbers in the world."""
        self._notices = notices
        self._everyone = everyone
        self._told = threading.Event()  # another process has told of its failure
        self._store_is_silent = False
        self._silent: list[int] = []
        self._executor: Executor | None = None
        self._over = threading.Event()  # ends what this process waits for outside of the executor
        self.is_known = False
        self.error: Exception | None = None  # of another process

    def watch(self, executor: Executor) -> None:
        """Stops what ``executor`` runs once another process has failed."""
        self._executor = executor
        self._notices.watch(self._hear)  # until ``close``

    def tell(self, reason: str) -> None:
        """Tells the others that this process failed, unless one of them has told of its own failure."""
        if not self._told.is_set():
            self._notices.tell(reason)
        self.is_known = True

    def begin_wait(self) -> threading.Event:
        """An event that is set once another process has failed; the caller may set it too."""
        self._over.clear()
        if self.error is not None:
            self._over.set()
        return self._over

    def finish(self, work: dist.Work, timeout: float, whom: str) -> None:
        """Returns when ``work`` with other processes is done.

        Raises PeerError if one of them has failed, StepTimeout if one does not come in time.
        """
        over = self.begin_wait()
        future = work.get_future()
        future.add_done_callback(lambda _: over.set())
        if not over.wait(min(timeout, threading.TIMEOUT_MAX)):
            self.seek()
            raise StepTimeout(f"waited {timeout:g} seconds for {whom}{self.silence}")
        if not future.done():
            raise self.known_error()
        try:
            work.wait()
        except RuntimeError as error:
            self.seek()
            raise PeerError(
                f"this process waited for {whom}, and one has gone{self.silence}: {error}"
            ) from error

    def known_error(self) -> Exception:
        """The error of another process. Call it only once that is known."""
        assert self.error is not None
        return self.error

    def lost(self, error: Exception) -> None:
        """Called if another process cannot be reached. Waits briefly for the reason, then stops the step."""
        if not self._told.wait(GRACE):
            self._stop(error)

    def seek(self) -> None:
        """Finds the processes that do not answer: the one we wait for may itself wait for one of them."""
        answered = self._notices.ask(GRACE)
        self._store_is_silent = answered is None
        self._silent = [
            process
            for rank, process in enumerate(self._everyone)
            if answered is not None and rank not in answered and process != dist.get_rank()
        ]

    def describe(self) -> str:
        """The failure in words, for people."""
        return f"it failed in one of its processes{self.silence}"

    @property
    def silence(self) -> str:
        """Which processes did not answer, to add to a sentence."""
        if self._store_is_silent:
            return f", and {SILENT}"
        return "".join(f", and process {process} does not answer" for process in self._silent)

    def close(self) -> None:
        self._notices.close()

    def _hear(self, teller: int | None, text: str) -> None:
        self._told.set()
        who = "" if teller is None else f"process {self._everyone[teller]} failed: "
        self._stop(PeerError(f"{who}{text}"))

    def _stop(self, error: Exception) -> None:
        self.is_known = True
        self.error = error
        self._over.set()
        if self._executor is not None:
            self._executor.fail(error)
