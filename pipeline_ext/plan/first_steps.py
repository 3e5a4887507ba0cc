"""A pipeline's first steps: measured, where it is to choose the plan of those to come."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from .. import _C
from .profile import Profile

MEASURED_STEPS = 3


class Choice(Protocol):
    """What has been chosen; as text, for people."""

    @property
    def plan(self) -> _C.Plan: ...

    def tell(self) -> dict[str, Any]:
        """What JSON can hold, of which another process makes the same."""


class Profiled(Protocol):
    """The trace of a step."""

    def profile(self) -> Profile: ...


class Others(Protocol):
    """The other processes of a pipeline. One process chooses, and all follow that.

    Attributes:
        chooses: whether this one does.
    """

    chooses: bool

    def gather(self, trace: Profiled) -> Profiled | None:
        """Of all processes, in the one that chooses."""

    def hear(self, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """In every process what ``choose`` returns in the one that chooses."""


class FirstSteps:
    """Has a pipeline follow one plan after another, watches the steps, and then chooses.

    Attributes:
        choice: what the pipeline follows; None until it does.
        others: processes that are to choose the same; None for one alone.
    """

    others: Others | None = None

    def __init__(
        self,
        plans: Sequence[_C.Plan],
        choose: Callable[[Sequence[Profile]], Choice] | None = None,
        heard: Callable[[dict[str, Any]], Choice] | None = None,
    ) -> None:
        """``plans``: of each step to measure; alone, without ``choose``, that of all steps.

        ``heard``: makes of what a choice tells the same.
        """
        self.choice: Choice | None = None
        self._plans = plans
        self._following = plans[0]
        self._choose = choose
        self._heard = heard
        self._profiles: list[Callable[[], Profile | None]] = []

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

    def observe(self, trace: Profiled) -> None:
        """Takes in a step, which is profiled once that is needed."""
        self._profiles.append(functools.cache(functools.partial(self._profile, trace)))

    def prepare(self, follow: Callable[[_C.Plan], None]) -> None:
        """Before a step, has its plan followed; after enough steps chooses that once, and says so.

        If that is interrupted nothing has been chosen, and it can be called again.
        """
        if self.measures:
            self._follow(self._plans[len(self._profiles)], follow)
        elif self._choose is not None and self.choice is None:
            profiles = [profile() for profile in self._profiles]
            if self.others is None:
                choice = self._choose(profiles)
            else:
                choice = self._heard(self.others.hear(lambda: self._choose(profiles).tell()))
            self._follow(choice.plan, follow)
            self.choice = choice
            self._profiles.clear()
            if self.others is None or self.others.chooses:
                print(choice)

    def _profile(self, trace: Profiled) -> Profile | None:
        whole = trace if self.others is None else self.others.gather(trace)
        return None if whole is None else whole.profile()

    def _follow(self, plan: _C.Plan, follow: Callable[[_C.Plan], None]) -> None:
        if plan is not self._following:
            self._profiles[-1]()  # a GPU may still run the step; this waits for its end
            follow(plan)
            self._following = plan
