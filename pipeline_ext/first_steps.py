"""A pipeline's first steps: measured, where it is to choose the plan of those to come."""

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

from . import _C
from .profile import Profile

MEASURED_STEPS = 3


class Choice(Protocol):
    """What has been chosen; as text, for people."""

    @property
    def plan(self) -> _C.Plan: ...


class FirstSteps:
    """Has a pipeline follow one plan after another, watches the steps, and then chooses.

    Attributes:
        choice: what the pipeline follows; None until it does.
    """

    def __init__(
        self, plans: Sequence[_C.Plan], choose: Callable[[Sequence[Profile]], Choice] | None = None
    ) -> None:
        """``plans``: of each step to measure; alone, without ``choose``, that of all steps."""
        self.choice: Choice | None = None
        self._plans = plans
        self._following = plans[0]
        self._choose = choose
        self._profiles: list[Callable[[], Profile]] = []

    @property
    def plan(self) -> _C.Plan:
        """The plan to begin with."""
        return self._plans[0]

    @property
    def chooses(self) -> bool:
        """Whether there is something to choose."""
        return self._choose is not None

    @property
    def measures(self) -> bool:
        """Whether it wants to see another step."""
        return self.chooses and self.choice is None and len(self._profiles) < len(self._plans)

    def observe(self, profile: Callable[[], Profile]) -> None:
        """Takes in a step, which is profiled once that is needed."""
        self._profiles.append(functools.cache(profile))

    def prepare(self, follow: Callable[[_C.Plan], None]) -> None:
        """Before a step, has its plan followed; after enough steps chooses that once, and says so.

        If that is interrupted nothing has been chosen, and it can be called again.
        """
        if self.measures:
            self._follow(self._plans[len(self._profiles)], follow)
        elif self._choose is not None and self.choice is None:
            choice = self._choose([profile() for profile in self._profiles])
            self._follow(choice.plan, follow)
            self.choice = choice
            self._profiles.clear()
            print(choice)

    def _follow(self, plan: _C.Plan, follow: Callable[[_C.Plan], None]) -> None:
        if plan is not self._following:
            self._profiles[-1]()  # a GPU may still run the step; this waits for its end
            follow(plan)
            self._following = plan
