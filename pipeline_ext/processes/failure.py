"""What becomes of a pipeline when one of its processes fails."""

import threading
from typing import Protocol

import torch.distributed as dist

from ..errors import PeerError, StepTimeout
from .notices import Notices

GRACE = 1.0  # seconds in which a process that is gone may still be found to have said why; replicas wait longer


class Executor(Protocol):
    """What runs a step."""

    def fail(self, error: Exception) -> object:
        """Stops it; may be called by any thread."""


class Failure:
    """That a process of a pipeline has failed: this one, which tells the others, or another."""

    def __init__(self, notices: Notices, everyone: list[int]) -> None:
        """``everyone``: those that are told, as numbers in the world."""
        self._notices = notices
        self._everyone = everyone
        self._told = threading.Event()  # by another process
        self._silent: list[int] = []
        self._executor: Executor | None = None
        self._over = threading.Event()  # what this process waits for outside of the executor
        self.is_known = False
        self.error: Exception | None = None  # of another process

    def watch(self, executor: Executor) -> None:
        """Stops what ``executor`` runs once another process has failed."""
        self._executor = executor
        self._notices.watch(self._hear)  # which the pipeline's end closes

    def tell(self, reason: str) -> None:
        """This process has failed; the others are told, unless one of them has told it."""
        if not self._told.is_set():
            self._notices.tell(reason)
        self.is_known = True

    def begin_wait(self) -> threading.Event:
        """Set once another process has failed; the caller sets it for his own ends."""
        self._over.clear()
        if self.error is not None:
            self._over.set()
        return self._over

    def finish(self, work: dist.Work, timeout: float, whom: str) -> None:
        """Returns when ``work`` with other processes is done.

        Raises PeerError where one of them has failed, StepTimeout where one does not come in time.
        """
        over = self.begin_wait()
        future = work.get_future()
        future.add_done_callback(lambda _: over.set())
        if not over.wait(min(timeout, threading.TIMEOUT_MAX)):
            raise StepTimeout(f"waited {timeout:g} seconds for {whom}")
        if not future.done():
            raise self.error
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerError(f"this process waited for {whom}, and one has gone: {error}") from error

    def lost(self, error: Exception) -> None:
        """Another process cannot be reached. It may yet be heard why."""
        if not self._told.wait(GRACE):
            self._stop(error)

    def seek(self) -> None:
        """Finds out who does not answer: whom this process waits for may only wait for that one in turn."""
        answered = self._notices.ask(GRACE)
        self._silent = [
            process
            for rank, process in enumerate(self._everyone)
            if rank not in answered and process != dist.get_rank()
        ]

    def describe(self) -> str:
        """For people."""
        silent = "".join(f", and process {process} does not answer" for process in self._silent)
        return f"it failed in one of its processes{silent}"

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
        self._executor.fail(error)
