"""How long a pipeline's threads live, and who may use them when."""

import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator

from . import _C
from .errors import DeadPipeline, PipelineError


class Lifetime:
    """The threads of one pipeline: at work for one call at a time, until closed.

    Attributes:
        executor: runs steps on them.
    """

    def __init__(self, pipeline: object, plan: _C.Plan, at_close: Callable[[], None]) -> None:
        """They end with ``pipeline``, or at exit; then ``at_close``, which must not refer to it, is called."""
        self.executor = _C.HostExecutor(_thread_names(plan))
        self._in_step = threading.Lock()
        self._owner = os.getpid()
        self._close = weakref.finalize(pipeline, _close, self.executor, at_close)
        # At exit called before the former.
        weakref.finalize(pipeline, _end_steps, self.executor, self._in_step)

    def close(self) -> None:
        """Stops a step that runs, and ends the threads."""
        self._close()

    def check(self) -> None:
        """Raises DeadPipeline where no step can run any more."""
        if os.getpid() != self._owner:
            raise DeadPipeline(
                "this pipeline was made in another process, and threads do not survive a fork; make it "
                "in the process that uses it"
            )
        if not self._close.alive:
            raise DeadPipeline("this pipeline is closed; make a new one")
        if self.executor.dead:
            raise DeadPipeline(
                "this pipeline is dead: a stage's code never returned in an earlier step; make a new one"
            )

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


def _thread_names(plan: _C.Plan) -> list[str]:
    if not plan.overlap:
        return [f"pe rank {rank}" for rank in range(plan.num_ranks)]
    return [f"pe rank {rank} {way}" for rank in range(plan.num_ranks) for way in ("F", "B")]


def _close(executor: _C.HostExecutor, at_close: Callable[[], None]) -> None:
    executor.close()
    at_close()


def _end_steps(executor: _C.HostExecutor, in_step: threading.Lock) -> None:
    """Ends another thread's step at exit; the interpreter may not end while torch frees its tensors."""
    was_busy = in_step.locked()
    executor.close()
    if was_busy and in_step.acquire(timeout=1.0):
        in_step.release()
        time.sleep(0.05)  # the thread still leaves the frames that hold some
