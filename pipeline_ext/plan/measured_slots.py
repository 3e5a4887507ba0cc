"""in_flight="auto" where the memory of activations is not given: the first step measures it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .. import _C
from ..errors import InvalidSchedule
from .costs import Costs, PerStage
from .first_steps import Choice, Chooser, FirstSteps
from .profile import Profile
from .slots import NOISE, choose_slots


class PlanOfSlots(Protocol):
    """Makes a plan in which stages may hold at least ``room`` microbatches, within the limit of ``memory``."""

    def __call__(self, *, room: Sequence[int] = (), memory: Costs | None = None) -> _C.Plan: ...


@dataclass(frozen=True)
class SlotChoice(Choice):
    """What ``in_flight="auto"`` has chosen from measured memory.

    Attributes:
        plan: the plan that the pipeline follows from now on.
        act_memory: measured bytes that a stage keeps for a microbatch, by stage.
        own: the most microbatches that the schedule itself holds, by stage.
        room: the most that the plan lets a stage hold, by stage.
        most_memory: the most bytes of activations that the plan lets a rank hold.
        gain: share of a step's time that the room is predicted to save where times vary by 30 %.
    """

    act_memory: list[int]
    own: list[int]
    room: list[int]
    most_memory: float
    gain: float

    def __str__(self) -> str:
        return (
            f'in_flight="auto": one microbatch takes {self.act_memory} bytes, by stage; stages hold at most '
            f"{self.room} where the schedule holds {self.own}, and no rank more than {self.most_memory:.0f} "
            f"bytes; a step whose times vary by {NOISE:.0%} is predicted to take {self.gain:.1%} less"
        )


def first_steps(plan_of: PlanOfSlots, costs: Costs, processes: bool) -> FirstSteps:
    """One step with the schedule's own slots, after which their number is chosen.

    Args:
        costs: costs with a ``memory_limit``, and without memory of activations.
        processes: as in ``simulate``.
    """
    return FirstSteps(
        [plan_of()],
        Chooser(
            lambda profiles: choose(plan_of, profiles[0], costs, processes),
            lambda told: heard(plan_of, told, costs),
        ),
        weighs=True,
    )


def heard(plan_of: PlanOfSlots, told: dict[str, Any], costs: Costs) -> SlotChoice:
    """Rebuilds a choice from ``Choice.tell()``, maybe of another process."""
    return SlotChoice(_kept(plan_of, replace(costs, act_memory=told["act_memory"]))(told["room"]), **told)


def choose(plan_of: PlanOfSlots, profile: Profile, costs: Costs, processes: bool = False) -> SlotChoice:
    """As many slots as shorten a step whose times vary, and as fit; ``costs`` say how long tasks take.

    Raises InvalidSchedule if not even the schedule's own slots keep the limit.
    """
    taken, limit = profile.act_memory, costs.memory_limit
    assert taken is not None and limit is not None  # the first step was weighed, and slots.check
    costs = replace(costs, act_memory=taken)
    kept = _kept(plan_of, costs)
    try:
        found = choose_slots(kept, costs, processes=processes)
    except InvalidSchedule as error:
        raise InvalidSchedule(
            f'in_flight="auto": one microbatch takes {taken} bytes, by stage, as the first step has measured, '
            f"and with memory_limit={limit} bytes the schedule holds too many; raise the limit, "
            "cut the batch into more microbatches, or name a schedule that holds fewer at once; if the limit "
            f"is not in bytes, give act_memory too ({error})"
        ) from error
    chosen, own = found.chosen, found.tried[0]
    plan = kept(chosen.room)
    gain = 1.0 - chosen.makespan / own.makespan if own.makespan else 0.0
    return SlotChoice(plan, taken, own.room, list(plan.limits), _most_memory(plan, taken, limit), gain)


def _most_memory(plan: _C.Plan, act_memory: Sequence[int], limit: PerStage) -> float:
    """What the fullest rank may hold: as many microbatches as its stages may, within its limit."""
    held = [0.0] * plan.num_ranks
    for rank, taken, most in zip(plan.rank_of_stage, act_memory, plan.limits):
        held[rank] += taken * most
    limits = [limit] * plan.num_ranks if isinstance(limit, (int, float)) else limit
    return max(min(of_rank, most) for of_rank, most in zip(held, limits))


def _kept(plan_of: PlanOfSlots, costs: Costs) -> Callable[[Sequence[int]], _C.Plan]:
    return lambda room: plan_of(room=room, memory=costs)
