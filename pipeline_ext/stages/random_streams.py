"""A stream of random numbers for each stage and microbatch.

The CPU has one generator for the process, from which ranks would draw in the order in which they happen to run.
Here each task draws from a generator of its own, seeded from the caller's. So losses and gradients depend on
the seed and the number of microbatches alone. Calls of torch are watched in stages that draw; other stages pay
nothing.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .drawing import Still, Stream, keep_states_by_thread

AnyOfAll = Callable[[bool], bool]  # whether it is true in any process

_MASK = 2**64 - 1
_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class StepStreams:
    """The streams of one step.

    Attributes:
        base: the number from which they are seeded; it may come from another process with the first microbatch.
        drew: the stages that have drawn.
    """

    def __init__(
        self, base: int | None, watched: Callable[[int], bool], replica: int, state: Tensor | None = None
    ) -> None:
        """``watched(stage)``: whether a stage may draw. ``base`` None: no stage may.

        ``state``: of the caller's generator.
        """
        self.base = base
        self.drew: set[int] = set()
        self._watched = watched
        self._replica = replica
        self._still = None if state is None else Still(state)

    def of(self, stage: int, m: int, backward: bool = False) -> Stream | None:
        """The context in which a stage's task runs for microbatch ``m``; None if the stage draws nothing."""
        if self.base is None or not self._watched(stage):
            if self._still is not None:
                self._still.hold()
            return None
        return Stream(self.seed(stage, m, backward), lambda: self.drew.add(stage))

    def of_all(self, m: int, backward: bool = False) -> contextlib.AbstractContextManager[Any]:
        """As ``of`` the first stage, whether it may draw or not. Others follow by ``Stream.become``."""
        if self.base is None:
            return _NOTHING
        return Stream(self.seed(0, m, backward), lambda: self.drew.add(0))

    def seed(self, stage: int, m: int, backward: bool = False) -> int:
        """What the stream of a task is seeded with."""
        assert self.base is not None
        return _seed(self.base, self._replica, stage, 2 * m + backward)


NO_STREAMS = StepStreams(None, lambda stage: False, 0)


class RandomStreams:
    """Seeds the streams of a pipeline's steps, and learns in the first one which stages draw."""

    def __init__(self, any_of_all: AnyOfAll | None = None, replica: int = 0) -> None:
        """``any_of_all``: None if this process has all stages.

        ``replica``: which of several replicas this pipeline is; each draws other numbers.
        """
        self._any_of_all = any_of_all
        self._replica = replica
        self._draws: set[int] = set()  # stages of this process
        self._anyone_draws = True  # in any process
        self._watches_all = True  # until the first training step has shown which draw
        self._learns = True
        self._state: Tensor | None = None
        keep_states_by_thread()

    def begin(self) -> StepStreams:
        """The streams of a step."""
        self._state = torch.default_generator.get_state()
        base = _number(self._state) if self._anyone_draws else None
        return StepStreams(
            base, lambda stage: self._watches_all or stage in self._draws, self._replica, self._state
        )

    def end(self, streams: StepStreams, trains: bool) -> None:
        """Called when a step has ended. If any stage has drawn, the caller's generator moves on.

        So do those of all processes, which scripts may rely on to be alike.
        """
        assert self._state is not None  # begin was called
        moved = not torch.equal(self._state, torch.default_generator.get_state())
        self._draws |= streams.drew
        if self._learns and trains:
            drew = bool(self._draws)
            self._anyone_draws = drew if self._any_of_all is None else self._any_of_all(drew)
            self._learns = self._watches_all = False
        elif moved and not self._watches_all:
            self._warn()
        if streams.drew if self._any_of_all is None else trains and self._anyone_draws:
            torch.empty((), dtype=torch.int64, device="cpu").random_()

    def _warn(self) -> None:
        self._watches_all = True
        if self._any_of_all is None:
            self._anyone_draws = True
        warnings.warn(
            "random numbers were drawn from torch's generator during a step, by a stage that had drawn none in "
            "the first step, or by another thread of the program; in this step they depend on the timing of "
            "threads",
            stacklevel=5,
        )


class TorchsOwn(RandomStreams):
    """No streams: stages on GPUs draw from the generators of torch."""

    def __init__(self) -> None:
        pass

    def begin(self) -> StepStreams:
        return NO_STREAMS

    def end(self, streams: StepStreams, trains: bool) -> None:
        pass


def _number(state: Tensor) -> int:
    """A number that follows from a generator's state."""
    return int(
        torch.empty((), dtype=torch.int64, device="cpu").random_(
            generator=torch.Generator("cpu").set_state(state)
        )
    )


def _seed(*parts: int) -> int:
    """Mixes numbers (the finalizer of SplitMix64: Steele, Lea, Flood, OOPSLA 2014)."""
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return mixed
