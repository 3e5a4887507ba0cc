"""The order in which the microbatches of a step enter, where they are unequal."""

from collections.abc import Sequence
from typing import Any, TypeVar

from .. import _C
from ..errors import InvalidArgument
from ..plan.costs import Costs
from ..plan.microbatch_order import MicrobatchOrder, microbatch_order

Value = TypeVar("Value")


class EntryOrder:
    """Finds it by simulation, with equal stages.

    Attributes:
        found: that of the last step; None if the microbatches entered as given.
    """

    def __init__(self) -> None:
        self.found: MicrobatchOrder | None = None
        self._of: tuple[_C.Plan, list[float]] | None = None  # what ``found`` was found for

    def find(self, plan: _C.Plan, work: Any) -> list[int] | None:
        """The order for microbatches of so much work, in any unit; None: for None.

        Raises InvalidArgument for what is no list of a number for each microbatch.
        """
        if work is None:
            self.found = None
            return None
        given = _numbers(work, plan.num_microbatches)
        if self.found is None or self._of is None or self._of[0] is not plan or self._of[1] != given:
            self.found = microbatch_order(plan, Costs(microbatch=given))
            self._of = plan, given
        return self.found.order


def check_reorders(many_processes: bool, graphs: bool) -> None:
    """Raises InvalidArgument where microbatches enter as given."""
    if many_processes:
        raise InvalidArgument(
            "microbatch_work lets microbatches enter in another order, which each process of a pipeline would "
            "have to take from its own; give all of them the microbatches in the order that microbatch_order "
            "finds"
        )
    if graphs:
        raise InvalidArgument(
            "microbatch_work lets microbatches enter in another order, and graphs=True replays one; leave one "
            "of them out"
        )


def entering(values: Sequence[Value], order: Sequence[int] | None) -> list[Value]:
    """What belongs to the given microbatches, in the order in which they enter."""
    return list(values) if order is None else [values[given] for given in order]


def as_given(values: Sequence[Value], order: Sequence[int] | None) -> list[Value]:
    """The opposite of ``entering``."""
    if order is None:
        return list(values)
    back = list(values)
    for value, given in zip(values, order, strict=True):
        back[given] = value
    return back


def _numbers(work: Any, count: int) -> list[float]:
    found = work.tolist() if hasattr(work, "tolist") else work  # an array or a tensor
    if (
        not isinstance(found, Sequence)
        or isinstance(found, str)
        or len(found) != count
        or not all(isinstance(w, int | float) and not isinstance(w, bool) and 0 <= w < 1e300 for w in found)
    ):
        raise InvalidArgument(
            f"microbatch_work is {work!r:.100}; give a number of at least 0 for each of the {count} "
            "microbatches"
        )
    return [float(w) for w in found]
