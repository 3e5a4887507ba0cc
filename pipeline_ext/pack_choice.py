"""How many results leave together: what simulation finds best."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import _C
from .errors import InvalidSchedule
from .profile import Profile, fastest
from .simulation import simulate

PlanOfPacks = Callable[[Sequence[int], Sequence[int]], _C.Plan]  # of gradients and of activations

MEASURED_STEPS = 3
_WORTH = 0.98  # more microbatches in flight must save at least so much time
_SECONDS = 2.0  # for looking at single boundaries


@dataclass(frozen=True)
class PackChoice:
    """What ``pack="auto"`` has chosen.

    Attributes:
        plan: what the pipeline follows from now on.
        packs, packs_forward: by boundary, for gradients and activations.
        predicted: seconds that the simulated step takes.
        predicted_at_1: seconds it would take if every result left alone.
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
        """Share of the step's time that it is predicted to save."""
        return 1.0 - self.predicted / self.predicted_at_1 if self.predicted_at_1 else 0.0

    def __str__(self) -> str:
        def text(packs: list[int]) -> str:
            return str(packs[0]) if len(set(packs)) == 1 else str(packs)

        return (
            f'pack="auto": K = {text(self.packs)} for gradients, {text(self.packs_forward)} for activations; '
            f"a step is predicted to take {self.predicted * 1e3:.2f} ms, {self.gain:.1%} less than the "
            f"{self.predicted_at_1 * 1e3:.2f} ms with K = 1"
        )


class AutoPack:
    """Watches the first steps, in which each result leaves alone, and then chooses."""

    def __init__(
        self,
        plan_of: PlanOfPacks,
        packs: list[int] | None,
        packs_forward: list[int] | None,
        boundaries: int,
    ) -> None:
        """``packs`` and ``packs_forward`` are None where they are to be chosen."""
        self._plan_of = plan_of
        self._given = (packs, packs_forward)
        self._boundaries = boundaries
        self._profiles: list[Profile] = []

    def plan(self) -> _C.Plan:
        """The plan to begin with."""
        packs, packs_forward = (p or [1] * self._boundaries for p in self._given)
        return self._plan_of(packs, packs_forward)

    @property
    def measures(self) -> bool:
        """Whether it is yet to choose."""
        return None in self._given and self._boundaries > 0 and len(self._profiles) < MEASURED_STEPS

    def observe(self, profile: Profile) -> PackChoice | None:
        """Takes in a step; after the last one it chooses."""
        self._profiles.append(profile)
        if self.measures:
            return None
        return choose(self._plan_of, fastest(self._profiles), *self._given)


def choose(
    plan_of: PlanOfPacks,
    profile: Profile,
    packs: list[int] | None = None,
    packs_forward: list[int] | None = None,
) -> PackChoice:
    """The K, by boundary, with which the simulated step is shortest; the smaller one where it hardly matters.

    Simulates K = 1, 2, 4, ..., M for all boundaries, then for two seconds at most half and twice of it at
    single ones. A K that would not end, or not within the limits given to ``plan_of``, is left out.

    Args:
        plan_of: makes a plan of packs for gradients and for activations, by boundary.
        packs, packs_forward: given where they are not to be chosen.
    """
    boundaries = range(len(profile.result_bytes))
    chosen = [p or [1 for _ in boundaries] for p in (packs, packs_forward)]
    free = [way for way, given in enumerate((packs, packs_forward)) if given is None]
    plan = plan_of(*chosen)
    microbatches, simulated = plan.num_microbatches, 0

    def predict(candidate: list[list[int]]) -> float:
        nonlocal simulated
        try:
            plan = plan_of(*candidate)
        except InvalidSchedule:
            return math.inf
        simulated += 1
        return simulate(plan, profile.costs(plan)).makespan

    best = at_1 = predict(chosen)

    def try_out(way: int, packs: list[int], worth: float = _WORTH) -> None:
        nonlocal best, chosen
        candidate = [packs if w == way else p for w, p in enumerate(chosen)]
        predicted = predict(candidate)
        if predicted <= worth * best:
            best, chosen = predicted, candidate

    doubled = [1 << i for i in range(1, microbatches.bit_length()) if 1 << i < microbatches]
    for way in free:
        for k in (*doubled, microbatches):
            try_out(way, [k for _ in boundaries])
    deadline = time.monotonic() + _SECONDS
    for way in free:
        for b in boundaries:
            for factor, worth in ((0.5, 1.0), (2, _WORTH)):
                k = int(chosen[way][b] * factor)
                if 1 <= k <= microbatches and time.monotonic() < deadline:
                    packed = [k if other == b else p for other, p in enumerate(chosen[way])]
                    try_out(way, packed, worth)
    return PackChoice(plan_of(*chosen), *chosen, predicted=best, predicted_at_1=at_1, simulated=simulated)
