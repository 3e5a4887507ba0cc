"""Chooses a schedule by simulation, at the costs measured in a pipeline's first steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .. import _C
from ..errors import InvalidArgument, InvalidSchedule
from .build import ScheduleLike, slots_of_ranks
from .costs import Costs
from .first_steps import MEASURED_STEPS, Choice, Chooser, FirstSteps
from .profile import Profile, fastest
from .search import search
from .simulation import simulate

_WORTH = 0.98  # another schedule must shorten the step to this share of its time
_SECONDS = 2.0  # limits of the search
_TRIALS = 2000

# By placement, the schedule of the first steps, and that of the last measured step. The latter splits the
# backward if a schedule of this placement can, so that I and W are measured too.
_FIRST = {
    "linear": ("1f1b", "zb-h1"),
    "v": ("zbv", "zbv"),
    "looped": ("interleaved-1f1b", "interleaved-1f1b"),
}


class PlanOf(Protocol):
    """Makes a plan of a schedule that keeps the limit of ``memory``."""

    def __call__(self, schedule: ScheduleLike, *, memory: Costs | None = None) -> _C.Plan: ...


@dataclass(frozen=True)
class ScheduleChoice(Choice):
    """What ``schedule="auto"`` has chosen.

    Attributes:
        plan: the plan that the pipeline follows from now on.
        schedule: its name; ``"zb-auto"`` for an order that a search found.
        predicted: seconds of the simulated step.
        first: the schedule of the first steps.
        predicted_first: seconds of the simulated step with that.
        simulated: number of plans tried.
        order: for an order that a search found, each rank's actions as text; otherwise None.
        slots: the most microbatches that a rank may hold at once, by rank or for all; None if the pipeline's
            ``costs`` limit its memory.
    """

    schedule: str
    predicted: float
    first: str
    predicted_first: float
    simulated: int
    order: list[list[str]] | None = None
    slots: float | list[float] | None = None

    @property
    def gain(self) -> float:
        """Share of the step's time that the choice is predicted to save."""
        return 1.0 - self.predicted / self.predicted_first if self.predicted_first else 0.0

    def __str__(self) -> str:
        than = f"{self.gain:.1%} less than the {self.predicted_first * 1e3:.2f} ms with {self.first}"
        if self.schedule == self.first:
            than = f"and none of {self.simulated} plans takes much less"
        predicted = f"a step is predicted to take {self.predicted * 1e3:.2f} ms"
        return f'schedule="auto": {self.schedule}; {predicted}, {than}'


def check(packs: Sequence[int] | None, packs_forward: Sequence[int] | None, graphs: bool) -> None:
    """Raises InvalidArgument for arguments that ``schedule="auto"`` does not go with."""
    if packs is None or packs_forward is None:
        raise InvalidArgument(
            'schedule="auto" and pack="auto" would both choose from the first three steps; give pack and '
            "pack_forward numbers, or name a schedule"
        )
    if graphs:
        raise InvalidArgument(
            'schedule="auto" takes another plan as the fourth step begins, and graphs=True has captured the '
            "third; leave out one, or name the schedule that a run without graphs has chosen"
        )


def first_steps(
    plan_of: PlanOf, num_stages: int, num_ranks: int, in_flight: Sequence[int], memory: Costs | None
) -> FirstSteps:
    """The steps after which the schedule is chosen; ``in_flight`` and ``memory`` as in ``choose``."""
    first, last = _FIRST[_layout(num_stages, num_ranks)]
    plan = plan_of(first)
    try:
        plan_of_last = plan if last == first else plan_of(last)
    except InvalidSchedule:  # exceeds the memory limit
        plan_of_last = plan
    return FirstSteps(
        [plan] * (MEASURED_STEPS - 1) + [plan_of_last],
        Chooser(
            lambda profiles: choose(plan_of, merged(profiles), first, in_flight, memory),
            lambda told: heard(plan_of, told, memory),
            lambda choice: choice.predicted,
        ),
    )


def heard(plan_of: PlanOf, told: dict[str, Any], memory: Costs | None) -> ScheduleChoice:
    """Rebuilds a choice from ``Choice.tell()``, maybe of another process; ``memory`` as in ``choose``."""
    schedule, order, slots = (told[name] for name in ("schedule", "order", "slots"))
    if schedule == told["first"] and order is None:
        plan = plan_of(schedule)
    else:
        plan = plan_of(order or schedule, memory=memory if slots is None else Costs(memory_limit=slots))
    return ScheduleChoice(plan, **told)


def merged(profiles: Sequence[Profile]) -> Profile:
    """The least of each figure: ``B`` from steps with full backwards, ``I`` and ``W`` from the others."""
    whole = [profile for profile in profiles if profile.input_grad is None]
    split = [profile for profile in profiles if profile.input_grad is not None]
    found = fastest(profiles)
    if not whole or not split:
        return found
    parts = fastest(split)
    return replace(
        found,
        backward=fastest(whole).backward,
        input_grad=parts.input_grad,
        weight_grad=parts.weight_grad,
    )


def choose(
    plan_of: PlanOf,
    profile: Profile,
    first: str,
    in_flight: Sequence[int] = (),
    memory: Costs | None = None,
) -> ScheduleChoice:
    """The schedule whose simulated step is shortest; ``first`` unless another one is clearly shorter.

    Tries the schedules that place stages as ``first`` does, then orders that a search finds.

    Args:
        plan_of: makes a plan of a schedule.
        profile: measured times of the stages and messages.
        first: the schedule of the first steps.
        in_flight: the most microbatches that each stage may hold at once, or empty.
        memory: costs whose ``memory_limit`` is kept. Without a limit here or in ``in_flight``, no rank holds
            more microbatches at once than the fullest rank does with ``first``.
    """
    plan = plan_of(first)
    by_first = simulate(plan, profile.costs(plan))
    slots = None
    if memory is None or memory.memory_limit is None:
        slots = slots_of_ranks(in_flight, plan.rank_of_stage) if in_flight else max(by_first.peak_in_flight)
        memory = Costs(memory_limit=slots)

    def costs(of: _C.Plan) -> Costs:
        return profile.costs(of).with_memory_of(memory)

    best = ScheduleChoice(plan, first, by_first.makespan, first, by_first.makespan, simulated=1, slots=slots)
    simulated = 1
    for name, schedule, tried in _candidates(first, plan, costs(plan)):
        simulated += tried
        try:
            other = plan_of(schedule, memory=memory)
            predicted = simulate(other, costs(other)).makespan
        except InvalidSchedule:
            continue
        stays = other.rank_of_stage == plan.rank_of_stage
        if stays and predicted < min(best.predicted, _WORTH * by_first.makespan):
            order = None if isinstance(schedule, str) else schedule
            best = replace(best, plan=other, schedule=name, predicted=predicted, order=order)
    return replace(best, simulated=simulated)


def _candidates(first: str, plan: _C.Plan, costs: Costs) -> Iterator[tuple[str, str | list[list[str]], int]]:
    """Schedules to try: the name, the schedule itself or an order, and how many simulations it took to find."""
    layout = _C.layout_of(first)
    names = [name for name in _C.schedule_names() if _C.layout_of(name) == layout]
    for name in names:
        if name != first:
            yield name, name, 1
    try:
        found = search(
            costs,
            num_ranks=plan.num_ranks,
            chunks=(plan.num_stages // plan.num_ranks,),
            microbatches=plan.num_microbatches,
            schedules=names,
            budget=_SECONDS,
            trials=_TRIALS,
        )
    except InvalidSchedule:  # all exceed the memory limit
        return
    if found.interrupted:
        raise KeyboardInterrupt  # Ctrl-C was meant for the caller's step, not for this search
    yield found.best.schedule, list(found.best.plan.order().values()), found.simulations


def _layout(num_stages: int, num_ranks: int) -> str:
    if num_stages == num_ranks:
        return "linear"
    return "v" if num_stages == 2 * num_ranks else "looped"
