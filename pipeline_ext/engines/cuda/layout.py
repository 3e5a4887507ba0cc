"""On which stream, and in which order, each action of a plan is enqueued."""

from collections.abc import Sequence
from typing import NamedTuple

from ... import _C
from ...plan.costs import Costs

Action = tuple[str, int, int]  # kind, stage, microbatch


class Position(NamedTuple):
    """Where an action is enqueued."""

    op: int  # its number in the order of enqueueing
    stream: int


class StreamLayout:
    """The stream and the number of each action of a plan.

    Attributes:
        plan: the plan.
        streams: the plan laid out on streams.
        peak_in_flight, peak_in_flight_of_stage: most microbatches alive at once, by rank and by stage.
    """

    def __init__(self, plan: _C.Plan, device_of_rank: Sequence[int], rank: int | None = None) -> None:
        """Takes the order from the simulated step, with equal costs at all stages.

        ``rank``: this process's rank, if each rank is a process; None: all ranks are here.
        """
        by_stage = Costs().by_stage(plan.num_stages, plan.num_ranks)
        self.plan = plan
        simulated = _C.simulate(plan, by_stage)
        self.streams = _C.StreamPlan(plan, by_stage, simulated, list(device_of_rank), rank)
        self.peak_in_flight: list[int] = simulated.peak_in_flight
        self.peak_in_flight_of_stage: list[int] = simulated.peak_in_flight_of_stage
        self._positions = {
            action: Position(op, stream) for op, (action, stream, _) in enumerate(self.streams.ops)
        }

    def position(self, kind: str, stage: int, m: int) -> Position:
        """The position of an action, or of the SEND that carries its results to another device or process.

        The position of another process's SEND is where this process receives its message.
        """
        return self._positions[kind, stage, m]

    def has(self, kind: str, stage: int, m: int) -> bool:
        """Whether there is such an action."""
        return (kind, stage, m) in self._positions
