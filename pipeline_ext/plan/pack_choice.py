"""How many results leave together: what simulation finds best."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

from .. import _C
from ..errors import InvalidSchedule
from .first_steps import MEASURED_STEPS, FirstSteps
from .profile import Profile, fastest
from .simulation import simulate

_WORTH = 0.98  # of the time, at most, that a larger K must leave
_SECONDS = 2.0  # for the search

Packs = Sequence[Sequence[int]]  # of gradients and of activations, by boundary


class PlanOfPacks(Protocol):
    """Makes a plan; ``room``: how many microbatches each stage may hold at least."""

    def __call__(
        self, packs: Sequence[int], packs_forward: Sequence[int], room: Sequence[int] = ()
    ) -> _C.Plan: ...


@dataclass(frozen=True)
class PackChoice:
    """What ``pack="auto"`` has chosen.

    Attributes:
        plan: what the pipeline follows from now on.
        packs, packs_forward: by boundary, for gradients and activations.
        predicted: seconds that the simulated step takes.
        predicted_at_1: seconds it would take with K = 1 where K was to be chosen, in the same memory: each
            stage may hold as many microbatches as in ``plan``.
        simulated: plans that were tried.
    """

    plan: _C.Plan
    packs: list[int]
    packs_forward: list[int]
    predicted: float
    predicted_at_1: float
    simulated: int

    @property
    def gain(self) -> float:
        """Share of the step's time that packing alone is predicted to save."""
        return 1.0 - self.predicted / self.predicted_at_1 if self.predicted_at_1 else 0.0

    def tell(self) -> dict[str, Any]:
        """What JSON can hold, for ``heard``."""
        return {name: value for name, value in vars(self).items() if name != "plan"}

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
    """Those of a pipeline in which each result leaves alone where that is to be chosen.

    ``packs`` and ``packs_forward`` are None there.
    """
    given = (packs, packs_forward)
    plan = plan_of(*(p or [1] * boundaries for p in given))
    if None not in given or boundaries == 0:
        return FirstSteps([plan])
    return FirstSteps(
        [plan] * MEASURED_STEPS,
        lambda profiles: choose(plan_of, fastest(profiles), *given),
        lambda told: heard(plan_of, told),
    )


def heard(plan_of: PlanOfPacks, told: dict[str, Any]) -> PackChoice:
    """The choice that has told this, maybe in another process."""
    return PackChoice(plan_of(told["packs"], told["packs_forward"]), **told)


def choose(
    plan_of: PlanOfPacks,
    profile: Profile,
    packs: list[int] | None = None,
    packs_forward: list[int] | None = None,
) -> PackChoice:
    """The K, by boundary, with which the simulated step is shortest; the smaller one where it hardly matters.

    Simulates K = 1, 2, 4, ..., M for all boundaries, in both directions if both are to be chosen, then half
    and twice of it at single ones, for two seconds at most. A K counts by what it saves over K = 1 in the
    same memory: to hold more microbatches hides latency, but takes no packing. One that would not end, or
    not within the limits given to ``plan_of``, is left out.

    Args:
        plan_of: makes a plan of packs for gradients and for activations, by boundary.
        packs, packs_forward: given where they are not to be chosen.
    """
    given = (packs, packs_forward)
    boundaries = range(len(profile.result_bytes))
    alone = [p or [1 for _ in boundaries] for p in given]
    simulated = 0

    def predict(packs: Packs, room: Sequence[int] = ()) -> tuple[_C.Plan, float]:
        nonlocal simulated
        simulated += 1
        plan = plan_of(*packs, room)
        return plan, simulate(plan, profile.costs(plan)).makespan

    plan, at_1 = predict(alone)
    best = PackChoice(plan, *alone, predicted=at_1, predicted_at_1=at_1, simulated=simulated)
    most = plan.num_microbatches

    def candidates() -> Iterator[tuple[Packs, float]]:
        """Packs, and what share of the best time so far they are worth."""
        powers = [*(1 << i for i in range(most.bit_length()) if 1 << i < most), most]
        grid = product(*([1] if p else powers for p in given))
        for ks in sorted(grid, key=math.prod)[1:]:
            yield [p or [k for _ in boundaries] for p, k in zip(given, ks)], _WORTH
        for way, b, (factor, worth) in product((0, 1), boundaries, ((0.5, 1.0), (2, _WORTH))):
            packs = [list(best.packs), list(best.packs_forward)]
            packs[way][b] = int(packs[way][b] * factor)
            if given[way] is None and 1 <= packs[way][b] <= most:
                yield packs, worth

    deadline = time.monotonic() + _SECONDS
    for packs, worth in candidates():
        if time.monotonic() > deadline:
            break
        try:
            plan, predicted = predict(packs)
        except InvalidSchedule:
            continue
        if predicted > worth * best.predicted:
            continue
        in_same_memory = min(at_1, predict(alone, plan.limits)[1])
        if predicted < _WORTH * in_same_memory:
            best = PackChoice(plan, *packs, predicted, in_same_memory, simulated)
    return replace(best, simulated=simulated)
