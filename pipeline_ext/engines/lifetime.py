"""The lifetime of a pipeline's engine, which one call at a time may use."""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from ..errors import DeadPipeline, PipelineError
from .protocol import Engine


class NoEngine:
    """In place of the engine of a pipeline whose model is not cut yet."""

    dead = False
    death = ""

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Lifetime:
    """Lets one call at a time use the engine of a pipeline, until it is closed."""

    def __init__(self, pipeline: object, engine: "Engine[Any] | NoEngine") -> None:
        """The engine is closed when ``pipeline`` is freed, or at exit."""
        self._engine = engine
        self._in_step = threading.Lock()
        self._owner = os.getpid()
        self._close = weakref.finalize(pipeline, engine.close)
        # At exit this runs before the one above.
        weakref.finalize(pipeline, _end_steps, engine.stop, self._in_step)

    def close(self) -> None:
        """Stops a running step, and closes the engine."""
        self._close()

    def check(self) -> None:
        """Raises DeadPipeline if no step can run any more."""
        if os.getpid() != self._owner:
            raise DeadPipeline(
                "this pipeline was made in another process, and neither threads nor GPUs survive a "
                "fork; make it in the process that uses it"
            )
        if not self._close.alive:
            raise DeadPipeline("this pipeline is closed; make a new one")
        if self._engine.dead:
            raise DeadPipeline(f"this pipeline is dead: {self._engine.death}; make a new one")

    @contextlib.contextmanager
    def one_at_a_time(self, what: str) -> Iterator[None]:
        """Raises PipelineError, which names ``what``, while another thread is inside it."""
        if not self._in_step.acquire(blocking=False):
            raise PipelineError(
                f"{what} while this pipeline is running a step already, which uses and changes its "
                "parameters and buffers; wait for it to end"
            )
        try:
            yield
        finally:
            self._in_step.release()


def _end_steps(stop: Callable[[], object], in_step: threading.Lock) -> None:
    """Ends another thread's step at exit; the interpreter may not end while torch frees its tensors."""
    was_busy = in_step.locked()
    stop()
    if was_busy and in_step.acquire(timeout=1.0):
        in_step.release()
        time.sleep(0.05)  # the thread still has to leave the frames that hold some of them
