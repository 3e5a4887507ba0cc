"""What a replica sees of its group, whatever carries the tensors."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Work(Protocol):
    """A reduction under way."""

    ended: int  # nanoseconds of time.monotonic_ns; once ``wait`` has returned

    def wait(self, timeout: float) -> None:
        """Returns when the tensor holds the mean.

        Raises StepTimeout after ``timeout`` seconds, which aborts the group, and ReductionError if the group
        was aborted or the members' tensors do not match.
        """


class Member(Protocol):
    """One replica's place in its group; hashable, and equal to whatever stands for the same place."""

    rank: int
    size: int

    def begin(self, plan: Sequence[str], timeout: float) -> None:
        """Called as a step begins, with what it is going to reduce, in words: the same for all members.

        Each reduction of the step fails where another member's has not begun ``timeout`` seconds after it.
        """

    def all_reduce(self, tensor: Tensor) -> Work:
        """Begins to replace ``tensor`` by the mean of all members' tensors, and returns at once.

        The members' n-th calls belong together: all call in the same order, with as many elements of the same
        type. What goes wrong later is raised by the work's ``wait``. Raises InvalidArgument for a tensor that
        is not contiguous and floating-point.
        """

    def check(self) -> None:
        """Raises ReductionError if the group was aborted."""

    def abort(self, error: BaseException) -> None:
        """Ends the group: whatever is not yet reduced fails for all members, with ``error`` as the reason."""
