"""A plan on streams, in the words of stages and microbatches."""

from collections.abc import Sequence
from typing import NamedTuple

from ... import _C
from ...plan.costs import Costs

Action = tuple[str, int, int]  # kind, stage, microbatch


class Place(NamedTuple):
    """Where an action is enqueued."""

    step: int  # in the order of enqueueing
    stream: int


class StreamLayout:
    """Where each action of a plan is enqueued.

    Attributes:
        plan: the plan.
        streams: the plan laid out on streams.
        peak_in_flight, peak_in_flight_of_stage: most microbatches alive at once, by rank and by stage.
    """

    def __init__(self, plan: _C.Plan, device_of_rank: Sequence[int], rank: int | None = None) -> None:
        """The order is that of the simulated step with equal stages.

        ``rank``: of this process, where each rank is one, and what is laid out; None: all ranks are here.
        """
        by_stage = Costs().by_stage(plan.num_stages, plan.num_ranks)
        self.plan = plan
        simulated = _C.simulate(plan, by_stage)
        self.streams = _C.StreamPlan(plan, by_stage, simulated, list(device_of_rank), rank)
        self.peak_in_flight: list[int] = simulated.peak_in_flight
        self.peak_in_flight_of_stage: list[int] = simulated.peak_in_flight_of_stage
        self._places = {
            action: Place(number, stream) for number, (action, stream, _) in enumerate(self.streams.steps)
        }

    def place(self, kind: str, stage: int, m: int) -> Place:
        """Where an action of the plan is, or the SEND that carries its results to another device or process.

        The SEND of another process is where its message is received.
        """
        return self._places[kind, stage, m]

    def has(self, kind: str, stage: int, m: int) -> bool:
        """Whether there is such an action."""
        return (kind, stage, m) in self._places
