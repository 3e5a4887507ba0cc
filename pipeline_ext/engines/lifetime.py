"""The lifetime of a pipeline's engine, which one call at a time may use."""

import os
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .. import _C
from ..errors import DeadPipeline
from .protocol import Engine

# By parameter or buffer: the turns of the pipelines that have it.
_turns: WeakIdKeyDictionary = WeakIdKeyDictionary()


class NoEngine:
    """In place of the engine of a pipeline whose model is not cut yet."""

    dead = False
    death = ""
    interruption = None

    def stop(self) -> None: ...

    def close(self) -> None: ...


class Lifetime:
    """Lets one call at a time use the engine of a pipeline, until it is closed."""

    def __init__(
        self, pipeline: object, engine: "Engine[Any] | NoEngine", tensors: Iterable[Tensor] = ()
    ) -> None:
        """The engine is closed when ``pipeline`` is freed, or at exit.

        ``tensors``: the parameters and buffers that a step uses. Of pipelines that share some, one at a time is
        used: each would add to the same gradients, and put its own tensors in the place of tied ones.
        """
        self._engine = engine
        self._turn = _turn_among(tensors)
        self._owner = os.getpid()
        self._close = weakref.finalize(pipeline, engine.close)
        # At exit this runs before the one above.
        weakref.finalize(pipeline, _end_steps, engine.stop, self._turn)

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
            error = self._engine.interruption
            why = self._engine.death if error is None else f"{self._engine.death}: {error}"
            raise DeadPipeline(f"this pipeline is dead: {why}; make a new one")

    def turn(self, what: str) -> _C.Taking:
        """A context that one call is in at a time. Entering it raises PipelineError, which names ``what``.

        Ctrl-C at any moment leaves it, if it is used in a ``with`` statement itself.
        """
        return self._turn.take(what)


def _turn_among(tensors: Iterable[Tensor]) -> _C.Turn:
    """A turn that excludes those of other pipelines with some of these tensors."""
    turn = _C.Turn()
    others: weakref.WeakSet[_C.Turn] = weakref.WeakSet()
    for tensor in tensors:
        known = _turns.setdefault(tensor, weakref.WeakSet())
        others |= known
        known.add(turn)
    for other in others:
        if other is not turn:
            turn.exclude(other)
    return turn


def _end_steps(stop: Callable[[], object], turn: _C.Turn) -> None:
    """Ends another thread's step at exit; the interpreter may not end while torch frees its tensors."""
    was_busy = turn.taken
    stop()
    until = time.monotonic() + 1.0
    while turn.taken and time.monotonic() < until:
        time.sleep(0.01)
    if was_busy:
        time.sleep(0.05)  # the thread still has to leave the frames that hold some of them
