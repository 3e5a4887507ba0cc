"""A stream of random numbers for each stage and microbatch.

The CPU has one generator for the process, from which ranks would draw in the order in which they happen to
run. Here each task draws from a stream of its own, seeded from the caller's generator. So losses and gradients
depend on the seed and the number of microbatches alone.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import drawing

AnyOfAll = Callable[[bool], bool]  # whether it is true in any process

_MASK = 2**64 - 1


class StepStreams:
    """The streams of one step; see ``drawing.Seeds``.

    Attributes:
        state: of the caller's generator as the step begins.
        travels: whether the number from which they are seeded comes from another process with the microbatches.
        drew: the stages that have drawn.
    """

    def __init__(self, state: Tensor, replica: int, travels: bool = False) -> None:
        self.state = state
        self.travels = travels
        self.drew: set[int] = set()
        self._replica = replica
        self._base: int | None = None

    @property
    def base(self) -> int:
        """The number from which they are seeded."""
        if self._base is None:
            self._base = _number(self.state)
        return self._base

    @base.setter
    def base(self, base: int) -> None:
        self._base = base

    def enter(self, stage: int, m: int, backward: bool = False) -> None:
        """From now on the calling thread draws from the stream of this task."""
        drawing.enter((self, stage, 2 * m + backward))

    @contextlib.contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """Inside it, the calling thread may enter tasks."""
        try:
            self.start()
            yield
        finally:
            self.leave()

    def start(self) -> None:
        """From now on the calling thread may enter tasks."""

    def leave(self) -> None:
        """From now on the calling thread draws from torch's own generators. May be called again."""
        drawing.enter(None)

    def seed(self, stage: int, part: int) -> int:
        return _seed(self.base, self._replica, stage, part)

    def on_device(self, stage: int) -> torch.Generator | None:
        return None


class NoStreams(StepStreams):
    """Stages draw from torch's own generators."""

    def __init__(self) -> None:
        super().__init__(torch.empty(0, device="cpu"), 0)

    def enter(self, stage: int, m: int, backward: bool = False) -> None:
        pass


class RandomStreams:
    """Seeds the streams of a pipeline's steps."""

    def __init__(self, any_of_all: AnyOfAll | None = None, replica: int = 0) -> None:
        """``any_of_all``: None if this process has all stages.

        ``replica``: which of several replicas this pipeline is; each draws other numbers.
        """
        self._any_of_all = any_of_all
        self._replica = replica
        self._draws: bool | None = None  # whether any stage drew in the first training step
        self._warned = False
        drawing.install()

    def begin(self) -> StepStreams:
        """The streams of a step."""
        return self._streams(torch.default_generator.get_state())

    def _streams(self, state: Tensor) -> StepStreams:
        return StepStreams(state, self._replica, self._any_of_all is not None and self._draws is not False)

    def end(self, streams: StepStreams, trains: bool) -> None:
        """Called when a step has ended. If any stage has drawn, the caller's generator moves on.

        So do those of all processes, which scripts may rely on to be alike.
        """
        if isinstance(streams, NoStreams):
            return
        drew = bool(streams.drew)
        if not torch.equal(streams.state, torch.default_generator.get_state()):
            self._warn(
                "during a step torch's generator for the CPU was seeded, or drawn from, by a stage that calls "
                "torch.manual_seed, an extension in C++, or another thread of the program; such numbers may "
                "depend on the timing of threads"
            )
        if not trains:
            moves = drew if self._any_of_all is None else self._any_of_all(drew)
        elif self._draws is None:
            moves = self._draws = drew if self._any_of_all is None else self._any_of_all(drew)
        else:
            # As often in many processes as in one, where a step that draws nothing would be seen.
            moves = drew or self._draws
            if drew and not self._draws and self._any_of_all is not None:
                self._warn(
                    "a stage of this process has drawn random numbers, and none had in the first step, so that "
                    "the processes do not share the number from which they are seeded; they are those of one "
                    "process only if all processes were seeded alike and all draw"
                )
        if moves:
            torch.empty((), dtype=torch.int64, device="cpu").random_()

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, stacklevel=5)


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
