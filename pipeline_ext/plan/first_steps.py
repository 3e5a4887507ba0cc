"""A pipeline's first steps. If something is "auto", they are measured, and the plan is chosen after them.

Where a choice promises a time, later steps are watched, and a plan is chosen anew when they take another.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from .. import _C
from .drift import Drift
from .profile import Profile

MEASURED_STEPS = 3


@dataclass(frozen=True)
class Choice:
    """What was chosen. ``str()`` of it is for people."""

    plan: _C.Plan

    def tell(self) -> dict[str, Any]:
        """Values that JSON can hold, from which ``Chooser.heard`` rebuilds the choice in another process."""
        return {name: value for name, value in vars(self).items() if name != "plan"}


class Profiled(Protocol):
    """The trace of a step."""

    def profile(self) -> Profile: ...


class Others(Protocol):
    """The other processes of a pipeline. One process chooses for all.

    Attributes:
        chooses: whether this process does.
    """

    chooses: bool

    def gather(self, trace: Profiled) -> Profiled | None:
        """The trace of all processes, in those that profile it; None elsewhere."""

    def hear(self, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Calls ``choose`` in the process that chooses; returns its result in every process."""

    def tell(self, value: bool) -> bool:
        """The ``value`` of the process that chooses, in every process."""


@dataclass(frozen=True)
class Chooser:
    """How to choose.

    Attributes:
        choose: makes a choice from the profiles of the measured steps.
        heard: rebuilds a choice from ``Choice.tell()``.
        promised: the seconds of a step that a choice promises; None: it is made once.
    """

    choose: Callable[[Sequence[Profile]], Choice]
    heard: Callable[[dict[str, Any]], Choice]
    promised: Callable[[Any], float] | None = None


class FirstSteps:
    """Makes a pipeline follow one plan after another, measures these steps, then chooses the plan to keep.

    Attributes:
        choice: what the pipeline follows; None until the choice is made, and while it is made anew.
        others: the other processes, which follow the same choice; None if this is the only one.
        timed: whether a step's time is known without waiting for its end.
        weighs: whether measured steps measure the memory of activations too.
    """

    others: Others | None = None
    timed = True

    def __init__(
        self, plans: Sequence[_C.Plan], chooser: Chooser | None = None, *, weighs: bool = False
    ) -> None:
        """``plans``: one for each step to measure; without a chooser, the plan of all steps."""
        self.choice: Choice | None = None
        self.weighs = weighs
        self._plans = plans
        self._following = plans[0]
        self._chooser = chooser
        self._profiles: list[Callable[[], Profile | None]] = []
        self._drift = Drift()

    @property
    def plan(self) -> _C.Plan:
        """The plan of the first step."""
        return self._plans[0]

    @property
    def chooses(self) -> bool:
        """Whether there is something to choose."""
        return self._chooser is not None

    @property
    def measures(self) -> bool:
        """Whether the next step is to be measured."""
        return self.chooses and self.choice is None and len(self._profiles) < len(self._plans)

    @property
    def watches(self) -> bool:
        """Whether ``took`` is to be told the time of the next step."""
        promises = self._chooser is not None and self._chooser.promised is not None
        return self.timed and promises and self.choice is not None

    def took(self, seconds: float) -> None:
        """Adds the time of a step that has ended well."""
        self._drift.add(seconds)

    def observe(self, trace: Profiled) -> None:
        """Keeps the trace of a measured step. It is profiled when the profile is needed."""
        self._profiles.append(functools.cache(functools.partial(self._profile, trace)))

    def prepare(self, follow: Callable[[_C.Plan], None]) -> None:
        """Call it before each step: it passes the step's plan to ``follow`` if that is another one than before.

        After the measured steps it chooses, and prints the choice. If that is interrupted, nothing has been
        chosen, and it can be called again. When steps take another time than promised, it says so, and steps
        are measured again.
        """
        if self._drift.due and self._has_drifted():
            self.choice = None
        if self.measures:
            self._follow(self._plans[len(self._profiles)], follow)
        elif self._chooser is not None and self.choice is None:
            choice = self._choose(self._chooser, [profile() for profile in self._profiles])
            self._follow(choice.plan, follow)
            self.choice = choice
            self._profiles.clear()
            if self._chooser.promised is not None:
                self._drift.begin(self._chooser.promised(choice))
            if self._speaks:
                print(choice)

    @property
    def _speaks(self) -> bool:
        """Whether this process chooses, and says what."""
        return self.others is None or self.others.chooses

    def _has_drifted(self) -> bool:
        """Whether to choose anew: one process decides, at the same step of all."""
        change = self._drift.look()
        changed = change is not None
        drifted = changed if self.others is None else self.others.tell(changed)
        self._drift.looked()
        if drifted and self._speaks:
            print(change)
        return drifted

    def _choose(self, chooser: Chooser, profiles: Sequence[Profile | None]) -> Choice:
        def choose() -> Choice:
            return chooser.choose([profile for profile in profiles if profile is not None])

        return choose() if self.others is None else chooser.heard(self.others.hear(lambda: choose().tell()))

    def _profile(self, trace: Profiled) -> Profile | None:
        whole = trace if self.others is None else self.others.gather(trace)
        return None if whole is None else whole.profile()

    def _follow(self, plan: _C.Plan, follow: Callable[[_C.Plan], None]) -> None:
        if plan is not self._following:
            if self._profiles:
                self._profiles[-1]()  # waits for the end of the step, which a GPU may still run
            follow(plan)
            self._following = plan
