"""What a plan would take: the scheduler run under a virtual clock."""

import math

from .. import _C
from ..base import arguments
from ..errors import InvalidSchedule
from .costs import Costs

_PLAIN = Costs()  # F = 1, B = 2, and messages cost nothing


class Simulation:
    """A simulated step. Times are in the unit of the costs.

    Attributes:
        plan: the plan that was simulated.
        makespan: time from the begin of the first task to the end of the last one.
        bubble: share of the makespan in which a rank runs nothing, mean over ranks.
        bubble_by_rank: the same for each rank.
        bubble_latest: the same for the rank that finishes last.
        bubble_from_first_start: of the rank with the longest span from the begin of its own first task to the
            end of its last one, the share of that span in which it runs nothing.
        first_start: when the first task of a rank begins, by rank.
        finish: when its last task ends, by rank.
        peak_in_flight: most microbatches alive at once, by rank.
        peak_in_flight_of_stage: the same by stage.
        peak_memory: most memory that microbatches take at once, by rank, in the unit of the costs.
        working_bytes: bytes of memory that the simulation took besides the plan.
    """

    def __init__(self, plan: _C.Plan, costs: _C.CostsByStage, times: _C.SimulatedTimes) -> None:
        self.plan = plan
        self.makespan: float = times.makespan
        self.bubble: float = times.bubble
        self.bubble_by_rank = [times.bubble_of(rank) for rank in range(plan.num_ranks)]
        self.bubble_latest: float = times.bubble_latest
        self.bubble_from_first_start: float = times.bubble_from_first_start
        self.first_start: list[float] = times.first_start
        self.finish: list[float] = times.finish
        self.peak_in_flight: list[int] = times.peak_in_flight
        self.peak_in_flight_of_stage: list[int] = times.peak_in_flight_of_stage
        self.peak_memory: list[float] = times.peak_memory
        self.working_bytes: int = times.working_bytes
        self._costs = costs
        self._times = times

    def __repr__(self) -> str:
        return f"<Simulation: makespan {self.makespan:g}, bubble {self.bubble:.1%}>"

    @property
    def begin(self) -> list[float]:
        """When each task begins, by its number in the plan."""
        return self._times.begin

    @property
    def end(self) -> list[float]:
        """When each task ends, by its number in the plan."""
        return _C.end_times(self.plan, self._costs, self._times)

    def order(self) -> dict[int, list[str]]:
        """Rank -> its actions as text, in the order in which they begin."""
        return dict(enumerate(_C.simulated_order(self.plan, self._times)))


def simulate(
    plan: _C.Plan, costs: Costs = _PLAIN, *, noise: float = 0.0, seed: int = 0, processes: bool = False
) -> Simulation:
    """Runs ``plan`` under a virtual clock.

    Args:
        plan: the plan to run. If its ranks are reactive, they keep ``costs.memory_limit`` as they go: each
            starts its ``F`` in the planned order, when the microbatch fits.
        costs: costs of tasks, links and memory.
        noise: coefficient of variation of a random factor on the time of each task (log-normal, mean 1).
        seed: seed of these factors, at least 0. The same action gets the same factor in every mode.
        processes: the ranks are processes: a reactive one knows of the others only the results that it has got.

    Raises:
        InvalidSchedule: the costs do not fit the plan or add up to no finite time, or the plan's order exceeds
            the memory limit.
        InvalidArgument: the noise or the seed is not valid.
    """
    arguments.check_type("plan", plan, _C.Plan)
    arguments.check_type("costs", costs, Costs)
    arguments.check_seed(seed)
    arguments.check_between("noise", noise, 0, 1000)
    by_stage = costs.by_stage(plan.num_stages, plan.num_ranks).with_noise(noise, seed)
    times = _C.simulate(plan, by_stage, apart=bool(processes))
    if times.makespan == math.inf:
        raise InvalidSchedule("the step takes longer than a number can tell; give times in a larger unit")
    return Simulation(plan, by_stage, times)
