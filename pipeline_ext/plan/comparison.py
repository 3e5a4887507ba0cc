"""Compares schedules: what each would take, or why it cannot run."""

import math
import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from .. import _C
from ..errors import InvalidSchedule
from . import microbatch_factors, zero_bubble
from .build import build_plan
from .costs import Costs
from .simulation import Simulation, simulate

_FIGURES = (
    "makespan", "ideal", "bubble", "bubble_from_first_start", "bubble_by_rank", "peak_in_flight", "peak_memory",
    "messages", "order", "lower_bound",
)  # fmt: skip

_ROUNDING = 1e-9  # relative error of sums of times


@dataclass(frozen=True)
class Planned:
    """What one schedule would take. Times and memory are in the units of the costs.

    Attributes:
        schedule: its name, or the file that holds it.
        ranks, microbatches: their numbers; None, like ``chunks``, if the file is not valid.
        chunks: the most stages that a rank holds; a second copy of a stage does not count.
        simulation: the simulated step; None if the schedule cannot run.
        reason: why it cannot run.
        chosen: whether a search chose it.
    """

    schedule: str
    ranks: int | None
    chunks: int | None
    microbatches: int | None
    costs: Costs
    simulation: Simulation | None = None
    reason: str | None = None
    chosen: bool = False

    @property
    def title(self) -> str:
        """The name to show."""
        return f"{self.schedule} (auto)" if self.chosen else self.schedule

    @cached_property
    def ideal(self) -> float:
        """Time that the busiest rank computes: ``F`` + ``I`` + ``W`` of its microbatches, less any overlap."""
        simulation = self._feasible()
        plan = simulation.plan
        times = self.costs.times(plan.num_stages)
        factors = self.costs.microbatch
        work = [0.0] * plan.num_ranks
        for kind, stage, microbatch, rank, _ in map(plan.describe, range(len(plan))):
            if kind in times:
                factor = 1.0 if factors is None else microbatch_factors.of(factors, stage, kind, microbatch)
                work[rank] += factor * times[kind][stage]
        busy = [(1.0 - bubble) * simulation.makespan for bubble in simulation.bubble_by_rank]
        return max(map(min, work, busy))

    @property
    def bubble(self) -> float:
        """Share of the makespan beyond ``ideal``."""
        makespan = self._feasible().makespan
        return 1.0 - self.ideal / makespan if makespan > 0 else 0.0

    @cached_property
    def lower_bound(self) -> float | None:
        """No order of these stages on these ranks has a shorter makespan.

        None if no such bound is known: with ``overlap``, two copies of the stages, or no backward.
        """
        plan = self._feasible().plan
        if plan.overlap or plan.rank_of_copy or not plan.has_backward:
            return None
        costs = self.costs.by_stage(plan.num_stages, plan.num_ranks)
        return _C.lower_bound(plan.rank_of_stage, plan.num_ranks, plan.num_microbatches, costs)[0]

    def as_json(self) -> dict[str, Any]:
        """Values that JSON can hold. If it cannot run, the figures are None and ``reason`` says why."""
        about = {
            "schedule": self.schedule,
            "ranks": self.ranks,
            "chunks": self.chunks,
            "microbatches": self.microbatches,
            "feasible": self.simulation is not None,
        }
        if self.simulation is None:
            return about | dict.fromkeys(_FIGURES) | {"reason": self.reason}
        simulation = self.simulation
        figures = (
            simulation.makespan,
            self.ideal,
            self.bubble,
            simulation.bubble_from_first_start,
            simulation.bubble_by_rank,
            simulation.peak_in_flight,
            simulation.peak_memory,
            simulation.plan.num_messages,
            {str(rank): actions for rank, actions in simulation.plan.order().items()},
            self.lower_bound,
        )
        return about | dict(zip(_FIGURES, figures, strict=True))

    def _feasible(self) -> Simulation:
        if self.simulation is None:
            raise InvalidSchedule(f"{self.title} is not possible: {self.reason}")
        return self.simulation


def planned(
    schedule: str,
    *,
    num_stages: int,
    num_ranks: int,
    microbatches: int,
    costs: Costs,
    overlap: bool = False,
) -> Planned:
    """Plans and simulates a schedule by name. If that is refused, ``reason`` says why."""
    try:
        plan = build_plan(
            schedule,
            num_stages=num_stages,
            microbatches=microbatches,
            num_ranks=num_ranks,
            overlap=overlap,
            costs=costs,
        )
    except InvalidSchedule as error:
        chunks = num_stages // num_ranks
        return Planned(schedule, num_ranks, chunks, microbatches, costs, reason=str(error))
    return simulated(schedule, plan, costs)


def searched(
    *,
    num_stages: int,
    num_ranks: int,
    microbatches: int,
    costs: Costs,
    overlap: bool = False,
    seconds: float = math.inf,
    trials: int | None = None,
    seed: int = 0,
) -> Planned:
    """Like ``planned`` for ``"zb-auto"``, but within a budget. Ctrl-C ends it with the best so far.

    Args:
        seconds: time limit. Until then the search starts again with other random numbers, and keeps the best.
        trials: orders to simulate; None: as many as ``"zb-auto"`` does, or as fit into ``seconds``.
    """
    refused = Planned(zero_bubble.NAME, num_ranks, num_stages // num_ranks, microbatches, costs)
    deadline = time.perf_counter() + seconds
    work = zero_bubble.WORK
    if trials is not None:
        work = trials * zero_bubble.num_tasks(num_stages, microbatches)
    best: zero_bubble.FoundOrder | None = None
    try:
        home = zero_bubble.rank_of_stage(num_stages, num_ranks)
        _, least = _C.lower_bound(home, num_ranks, microbatches, costs.by_stage(num_stages, num_ranks))
        while best is None or (trials is None and deadline - time.perf_counter() > 0):
            found = zero_bubble.find_order(
                costs,
                num_stages=num_stages,
                num_ranks=num_ranks,
                microbatches=microbatches,
                span=True,
                work=work,
                seconds=deadline - time.perf_counter(),
                seed=seed,
            )
            if best is None or found.time < best.time:
                best = found
            if found.interrupted or math.isinf(seconds) or found.time <= least * (1 + _ROUNDING):
                break
            seed += 1
    except InvalidSchedule as error:
        return replace(refused, reason=str(error))
    return simulated(zero_bubble.NAME, _C.plan_of_cells(best.cells, overlap=overlap), costs)


def simulated(schedule: str, plan: _C.Plan, costs: Costs) -> Planned:
    """Simulates a plan. If that is refused, ``reason`` says why."""
    chunks = max(map(plan.rank_of_stage.count, plan.rank_of_stage))
    found = Planned(schedule, plan.num_ranks, chunks, plan.num_microbatches, costs)
    try:
        return replace(found, simulation=simulate(plan, costs))
    except InvalidSchedule as error:
        return replace(found, reason=str(error))


def stages_of(schedule: str, num_ranks: int, chunks: int) -> int:
    """Number of stages of a named schedule on ``num_ranks``, with ``chunks`` a rank if it allows any number."""
    if schedule == zero_bubble.NAME:
        return num_ranks * max(1, chunks)
    return num_ranks * {"v": 2, "looped": max(2, chunks)}.get(_C.layout_of(schedule), 1)
