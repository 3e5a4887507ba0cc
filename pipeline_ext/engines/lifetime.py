"""How long a pipeline's engine lives, and who may use it when."""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from ..errors import DeadPipeline, PipelineError
from .protocol import Engine


class Lifetime:
    """The engine of one pipeline: at work for one call at a time, until closed."""

    def __init__(self, pipeline: object, engine: Engine) -> None:
        """It ends with ``pipeline``, or at exit."""
        self._engine = engine
        self._in_step = threading.Lock()
        self._owner = os.getpid()
        self._close = weakref.finalize(pipeline, engine.close)
        # At exit called before the former.
        weakref.finalize(pipeline, _end_steps, engine.stop, self._in_step)

    def close(self) -> None:
        """Stops a step that runs, and ends the engine."""
        self._close()

    def check(self) -> None:
        """Raises DeadPipeline where no step can run any more."""
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
        """Raises PipelineError, naming ``what``, while another thread is within it."""
        if not self._in_step.acquire(blocking=False):
            raise PipelineError(
                f"{what} while this pipeline is running a step already, which uses and changes its "
                "parameters and buffers; wait for it to end"
            )
        try:
            yield
        finally:
            self._in_step.release()


def _end_steps(stop: Callable[[], None], in_step: threading.Lock) -> None:
    """Ends another thread's step at exit; the interpreter may not end while torch frees its tensors."""
    was_busy = in_step.locked()
    stop()
    if was_busy and in_step.acquire(timeout=1.0):
        in_step.release()
        time.sleep(0.05)  # the thread still leaves the frames that hold some
