"""A replica's interface to its group, whatever carries the tensors."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

ENDED = "the group of replicas has ended: make a new one, and new pipelines"
UNEQUAL = "replicas need equal models, frozen alike, in equal pipelines"


class Work(Protocol):
    """A reduction that was launched."""

    @property
    def ended(self) -> int:
        """When it ended, in nanoseconds of time.monotonic_ns; once ``wait`` has returned."""

    def wait(self, timeout: float) -> None:
        """Returns when the tensor holds the mean.

        Raises StepTimeout after ``timeout`` seconds, which aborts the group. Raises ReductionError if the group
        was aborted, or if the members' tensors do not match.
        """


class Member(Protocol):
    """One replica's place in its group; hashable, and equal to any other object for the same place."""

    rank: int
    size: int

    def begin(self, plan: Sequence[str], timeout: float) -> None:
        """Called as a step begins. ``plan`` describes what the step reduces; all members must give the same.

        Each reduction of the step fails if another member's has not begun within ``timeout`` seconds.
        """

    def all_reduce(self, tensor: Tensor) -> Work:
        """Begins to replace ``tensor`` by the mean of all members' tensors, and returns at once.

        The members' n-th calls belong together: all call in the same order, with tensors of the same size and
        type. Later errors are raised by the work's ``wait``. Raises InvalidArgument for a tensor that is not
        contiguous and floating-point.
        """

    def check(self) -> None:
        """Raises ReductionError if the group was aborted."""

    def abort(self, error: BaseException) -> None:
        """Ends the group: unfinished reductions fail for all members, with ``error`` as the reason."""
