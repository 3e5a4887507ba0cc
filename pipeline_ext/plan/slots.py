"""How many microbatches stages should hold where times vary: more slots hide delays, and take memory."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .. import _C
from ..errors import InvalidArgument, InvalidSchedule
from .costs import Costs
from .simulation import simulate

NOISE = 0.3  # coefficient of variation for which "auto" chooses

_TIMES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)  # the slots that the schedule takes by itself
_WORTH = 1.005  # fewer slots whose step is no longer than this times the best one's are preferred
_SIMULATIONS = 24
_TASKS = 2_000_000  # simulated for one choice of slots, at most
_BAR = 30  # characters


@dataclass(frozen=True)
class Slots:
    """So many slots, and what they bring.

    Attributes:
        room: the most microbatches that a stage holds at once, by stage.
        makespan: of the simulated step where times vary, mean.
        peak_memory: the most that a rank holds in one of these simulations.
    """

    room: list[int]
    makespan: float
    peak_memory: float


@dataclass(frozen=True)
class TriedSlots:
    """Numbers of slots that were tried, the fewest first. ``str()`` of it is a table with a curve.

    Attributes:
        tried: all that keep the limit of memory.
        chosen: the fewest slots with which the step takes hardly longer than with the best.
        noise: the coefficient of variation of the times of tasks.
    """

    tried: list[Slots]
    chosen: Slots
    noise: float

    def __str__(self) -> str:
        first = self.tried[0].makespan
        rows = [f"times that vary by {self.noise:g}: slots of the fullest stage, mean makespan, memory"]
        for slots in self.tried:
            share = slots.makespan / first if first else 1.0
            mark = "  <- chosen" if slots is self.chosen else ""
            bar = "#" * max(1, round(_BAR * min(share, 1.0)))
            rows.append(
                f"{max(slots.room):>6} {slots.makespan:>12.6g} {share:>7.3f} {slots.peak_memory:>12.6g}  "
                f"{bar:<{_BAR}}{mark}"
            )
        return "\n".join(rows)


def choose_slots(
    plan_of: Callable[[Sequence[int]], _C.Plan],
    costs: Costs,
    *,
    noise: float = NOISE,
    processes: bool = False,
) -> TriedSlots:
    """Tries more and more slots under random times, as long as they keep ``costs.memory_limit``.

    Args:
        plan_of: makes the plan in which stages may hold at least so many microbatches, by stage.
        costs: costs of tasks, links and memory.
        noise: coefficient of variation of the times of tasks, which are independent and log-normal.
        processes: as in ``simulate``.

    Raises InvalidSchedule if not even the schedule's own slots keep the limit.
    """
    tried: list[Slots] = []
    for room in _rooms(plan_of(())):
        try:
            plan = plan_of(room)
        except InvalidSchedule:  # the order with so many exceeds the limit
            if not tried:
                raise
            break
        count = max(4, min(_SIMULATIONS, _TASKS // len(plan)))
        steps = [simulate(plan, costs, noise=noise, seed=seed, processes=processes) for seed in range(count)]
        tried.append(
            Slots(
                list(room),
                statistics.fmean(step.makespan for step in steps),
                max(max(step.peak_memory) for step in steps),
            )
        )
    best = min(slots.makespan for slots in tried)
    chosen = next(slots for slots in tried if slots.makespan <= _WORTH * best)
    return TriedSlots(tried, chosen, noise)


def check(costs: Costs | None, reactive: bool, *, chooses: bool, searches: bool, graphs: bool) -> None:
    """Raises InvalidArgument for arguments of ``Pipeline`` that ``in_flight="auto"`` does not go with.

    ``chooses``: whether the first steps choose something else; ``searches``: whether the schedule is "zb-auto".
    """
    if costs is None or costs.memory_limit is None:
        raise InvalidArgument(
            'in_flight="auto" takes as many microbatches as memory allows, and costs have no memory_limit; '
            "give costs=pe.Costs(memory_limit=...), the bytes of activations that a rank may hold, or "
            "act_memory too, what one microbatch takes at a stage, to give both in any unit"
        )
    if not reactive:
        raise InvalidArgument(
            'in_flight="auto" finds slots for ranks that react, and reactive is False; give in_flight a '
            "number, or leave reactive=False out"
        )
    if chooses:
        raise InvalidArgument(
            'in_flight="auto" with schedule="auto" or pack="auto" would choose twice; give in_flight a '
            "number, or name the schedule and give pack numbers"
        )
    if costs.act_memory is not None:
        return
    if costs.mem_i is not None or costs.mem_w is not None:
        raise InvalidArgument(
            'in_flight="auto" measures what one microbatch takes, as costs have no act_memory, and costs have '
            "mem_i or mem_w, a part of it; give act_memory too, or leave them out"
        )
    if searches or graphs:
        before = (
            'schedule="zb-auto" searches for an order within the memory_limit before the first step'
            if searches
            else "graphs=True captures steps of one plan"
        )
        raise InvalidArgument(
            'in_flight="auto" measures in the first step what one microbatch takes, as costs have no '
            f"act_memory, and {before}; give act_memory"
        )


def _rooms(plan: _C.Plan) -> Iterator[list[int]]:
    """Slots by stage, from the plan's own on."""
    last: list[int] = []
    for times in _TIMES:
        room = [min(plan.num_microbatches, math.ceil(times * limit)) for limit in plan.limits]
        if room != last:
            yield room
        last = room
