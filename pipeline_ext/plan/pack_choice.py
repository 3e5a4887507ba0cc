"""Chooses K, the number of microbatches whose results one message carries, by simulation."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, Protocol

from .. import _C
from ..errors import InvalidSchedule
from .first_steps import MEASURED_STEPS, Choice, Chooser, FirstSteps
from .profile import Profile, fastest
from .simulation import simulate

_WORTH = 0.98  # a larger K must shorten the step to this share of its time
_SECONDS = 2.0  # limit of the search


class _Packs(NamedTuple):
    """K by boundary."""

    gradients: list[int]
    activations: list[int]


class PlanOfPacks(Protocol):
    """Makes a plan. ``room``: the least number of microbatches that each stage may hold at once."""

    def __call__(
        self, packs: Sequence[int], packs_forward: Sequence[int], room: Sequence[int] = ()
    ) -> _C.Plan: ...


@dataclass(frozen=True)
class PackChoice(Choice):
    """What ``pack="auto"`` has chosen.

    Attributes:
        plan: the plan that the pipeline follows from now on.
        packs, packs_forward: K for gradients and for activations, by boundary.
        predicted: seconds of the simulated step.
        predicted_at_1: seconds of the simulated step with K = 1 wherever K was "auto", and the same memory:
            each stage may hold as many microbatches as in ``plan``.
        simulated: number of plans tried.
    """

    packs: list[int]
    packs_forward: list[int]
    predicted: float
    predicted_at_1: float
    simulated: int

    @property
    def gain(self) -> float:
        """Share of the step's time that packing alone is predicted to save."""
        return 1.0 - self.predicted / self.predicted_at_1 if self.predicted_at_1 else 0.0

    def __str__(self) -> str:
        def text(packs: list[int]) -> str:
            return str(packs[0]) if len(set(packs)) == 1 else str(packs)

        return (
            f'pack="auto": K = {text(self.packs)} for gradients, {text(self.packs_forward)} for activations; '
            f"a step is predicted to take {self.predicted * 1e3:.2f} ms, {self.gain:.1%} less than the "
            f"{self.predicted_at_1 * 1e3:.2f} ms with K = 1 in the same memory"
        )


def first_steps(
    plan_of: PlanOfPacks,
    packs: list[int] | None,
    packs_forward: list[int] | None,
    boundaries: int,
) -> FirstSteps:
    """First steps with K = 1 wherever K is "auto", which None stands for."""
    plan = plan_of(*_with_1(packs, packs_forward, boundaries))
    if boundaries == 0 or (packs is not None and packs_forward is not None):
        return FirstSteps([plan])
    return FirstSteps(
        [plan] * MEASURED_STEPS,
        Chooser(
            lambda profiles: choose(plan_of, fastest(profiles), packs, packs_forward),
            lambda told: heard(plan_of, told),
        ),
    )


def heard(plan_of: PlanOfPacks, told: dict[str, Any]) -> PackChoice:
    """Rebuilds a choice from ``Choice.tell()``, maybe of another process."""
    return PackChoice(plan_of(told["packs"], told["packs_forward"]), **told)


def choose(
    plan_of: PlanOfPacks,
    profile: Profile,
    packs: list[int] | None = None,
    packs_forward: list[int] | None = None,
) -> PackChoice:
    """The K by boundary whose simulated step is shortest; of values that hardly differ, the smaller one.

    Simulates K = 1, 2, 4, ..., M at all boundaries, in both directions if both are to be chosen, then half and
    twice the best K at single boundaries; stops after two seconds. A K counts by what it saves over K = 1 with
    the same memory: holding more microbatches hides latency, but needs no packing. A K that would deadlock, or
    that exceeds the limits given to ``plan_of``, is left out.

    Args:
        plan_of: makes a plan from K for gradients and for activations, by boundary.
        profile: measured times of the stages and messages.
        packs, packs_forward: K if it is given; None: to be chosen.
    """
    boundaries = len(profile.result_bytes)
    at_1 = _with_1(packs, packs_forward, boundaries)
    simulated = 0

    def predict(tried: _Packs, room: Sequence[int] = ()) -> tuple[_C.Plan, float]:
        nonlocal simulated
        simulated += 1
        plan = plan_of(tried.gradients, tried.activations, room)
        return plan, simulate(plan, profile.costs(plan)).makespan

    plan, time_at_1 = predict(at_1)
    best = PackChoice(plan, *at_1, predicted=time_at_1, predicted_at_1=time_at_1, simulated=simulated)
    most = plan.num_microbatches

    def candidates() -> Iterator[tuple[_Packs, float]]:
        """Values of K, each with the share of the best time so far that it may take at most."""
        powers = [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]
        grid = product(powers if packs is None else [1], powers if packs_forward is None else [1])
        for k, k_forward in sorted(grid, key=math.prod)[1:]:
            yield _Packs(packs or [k] * boundaries, packs_forward or [k_forward] * boundaries), _WORTH
        to_choose = [direction for direction, given in enumerate((packs, packs_forward)) if given is None]
        for direction, b, (factor, worth) in product(to_choose, range(boundaries), ((0.5, 1.0), (2, _WORTH))):
            changed = _Packs(list(best.packs), list(best.packs_forward))
            k = changed[direction][b] = int(changed[direction][b] * factor)
            if 1 <= k <= most:
                yield changed, worth

    deadline = time.monotonic() + _SECONDS
    for tried, worth in candidates():
        if time.monotonic() > deadline:
            break
        try:
            plan, predicted = predict(tried)
        except InvalidSchedule:
            continue
        if predicted > worth * best.predicted:
            continue
        in_same_memory = min(time_at_1, predict(at_1, plan.limits)[1])
        if predicted < _WORTH * in_same_memory:
            best = PackChoice(plan, *tried, predicted, in_same_memory, simulated)
    return replace(best, simulated=simulated)


def _with_1(packs: list[int] | None, packs_forward: list[int] | None, boundaries: int) -> _Packs:
    """K = 1 wherever it is to be chosen."""
    return _Packs(packs or [1] * boundaries, packs_forward or [1] * boundaries)
