"""Schedules that users write in Python: a placement, and what each rank does next."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import _C
from ..base import arguments
from ..errors import InvalidArgument, InvalidSchedule

PLACEMENTS = ("linear", "looped", "v")
DURATIONS = {"F": 1, "B": 2, "I": 1, "W": 1}


@dataclass(frozen=True)
class Placement:
    """Which rank holds each stage.

    Attributes:
        name: ``"linear"``: one stage on each rank; ``"looped"``: stage s on rank s % p; ``"v"``: stages s and
            2p - 1 - s on rank s.
        num_ranks: number of ranks, p.
        rank_of_stage: the rank of each stage.
    """

    name: str
    num_ranks: int
    rank_of_stage: Sequence[int]

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.rank_of_stage)

    def stages_of(self, rank: int) -> list[int]:
        """The stages on ``rank``, in ascending order."""
        return [s for s, r in enumerate(self.rank_of_stage) if r == rank]


@dataclass(frozen=True)
class Policy:
    """A schedule of your own, to be given as ``schedule=``.

    It decides what ranks do in one of three ways:

    - ``order``: a whole order. ``order(placement, rank, microbatches)`` returns a rank's actions as text.
    - ``preference`` and ``limit``: a rule. A rank runs the ready task whose kind comes first in ``preference``:
      ``("B", "F")`` or ``("I", "F", "W")``, in any order. A stage holds at most
      ``limit(placement, stage, microbatches)`` microbatches at once.
    - ``choose``: one task at a time. Whenever ``rank`` is idle and has ready tasks, ``choose(rank, ready)`` is
      called. It returns an action of the list ``ready``, or None to wait until another task ends. The calls
      follow a virtual clock with equal stages (F = I = W = 1, B = 2). Microbatches of one stage and kind run in
      ascending order.

    Attributes:
        placement: ``"linear"``, ``"looped"`` or ``"v"``.
        split: with ``choose``, whether the backward runs as ``I`` and ``W`` instead of ``B``.

    Raises InvalidArgument for any other combination.
    """

    placement: str = "linear"
    order: Callable[[Placement, int, int], Sequence[str]] | None = None
    preference: Sequence[str] = ()
    limit: Callable[[Placement, int, int], int] | None = None
    choose: Callable[[int, list[str]], str | None] | None = None
    split: bool = False

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise InvalidArgument(f"placement is {self.placement!r}; give one of {', '.join(PLACEMENTS)}")
        given = [self.order is not None, self.limit is not None, self.choose is not None]
        if sum(given) != 1:
            raise InvalidArgument("a policy has one of order=, limit= with preference=, and choose=")
        for name in ("order", "limit", "choose"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise InvalidArgument(f"{name} is {getattr(self, name)!r}; give a function")
        kinds = set(self.preference)
        if (self.limit is not None) != bool(kinds) or kinds not in (set(), {"B", "F"}, {"F", "I", "W"}):
            raise InvalidArgument(
                f"preference is {self.preference!r}; with limit= give B and F, or I, F and W, in the order in "
                "which a rank prefers them"
            )

    def plan(self, num_stages: int, num_ranks: int, microbatches: int, mode: Mapping[str, Any]) -> _C.Plan:
        """The plan of one step; ``mode``: keyword arguments of ``_C.plan_of_cells``. Raises InvalidSchedule."""
        placed = _C.rank_of_stage(self.placement, num_stages, num_ranks)
        placement = Placement(self.placement, num_ranks, placed)
        if self.limit is not None:
            limits = [
                arguments.count(
                    f"the policy's limit for stage {stage}", self.limit(placement, stage, microbatches)
                )
                for stage in range(num_stages)
            ]
            return _C.plan_of_rule(
                self.placement, list(self.preference), limits, num_ranks, microbatches, **mode
            )
        if self.choose is not None:
            rows = _Choosing(self.choose, placement, microbatches, self.split).rows()
        else:
            assert self.order is not None  # __post_init__ has checked that one of the three is given
            rows = [_row(rank, self.order(placement, rank, microbatches)) for rank in range(num_ranks)]
        plan = _C.plan_of_cells(rows, **mode)
        for stage, (rank, listed) in enumerate(zip(placed, plan.rank_of_stage)):
            if rank != listed:
                raise InvalidSchedule(
                    f"the policy's order for rank {listed} lists stage {stage}, which its placement "
                    f"{self.placement!r} has on rank {rank}"
                )
        return plan


def _row(rank: int, actions: Any) -> list[str]:
    """The actions that a policy's ``order`` returned for a rank, checked."""
    if isinstance(actions, str) or not isinstance(actions, Sequence):
        actions = [actions]
    if not all(isinstance(action, str) for action in actions):
        raise InvalidSchedule(
            f"the policy's order for rank {rank} is {actions!r:.200}; return a list of actions as text, "
            'as in ["0F0", "0B0"]'
        )
    return list(actions)


class _Choosing:
    """Plays a step in which a function chooses the tasks, under a virtual clock with equal stages."""

    def __init__(
        self,
        choose: Callable[[int, list[str]], str | None],
        placement: Placement,
        microbatches: int,
        split: bool,
    ) -> None:
        self._choose = choose
        self._placement = placement
        self._microbatches = microbatches
        self._kinds = ("F", "I", "W") if split else ("F", "B")
        # How many microbatches have begun and ended, by stage and kind.
        self._begun = {(s, k): 0 for s in range(placement.num_stages) for k in self._kinds}
        self._ended = dict(self._begun)

    def rows(self) -> list[list[str]]:
        """The actions of each rank, in the order in which they begin."""
        rows: list[list[str]] = [[] for _ in range(self._placement.num_ranks)]
        running: dict[
            int, tuple[int, tuple[int, str]]
        ] = {}  # rank -> when its task ends, and the stage and kind
        now = 0
        while any(count < self._microbatches for count in self._ended.values()):
            waiting: dict[int, list[str]] = {}
            for rank, row in enumerate(rows):
                ready = {} if rank in running else dict(self._ready(rank))
                if not ready:
                    continue
                action = self._choose(rank, list(ready))
                if action is None:
                    waiting[rank] = list(ready)
                    continue
                if action not in ready:
                    raise InvalidSchedule(
                        f"the policy chose {action!r:.100} for rank {rank}; choose one of {list(ready)}, or "
                        "None to wait"
                    )
                row.append(action)
                self._begun[ready[action]] += 1
                running[rank] = now + DURATIONS[ready[action][1]], ready[action]
            if not running:
                rank, actions = next(iter(waiting.items()))
                raise InvalidSchedule(
                    "the policy lets all ranks wait, so that nothing ever ends: it chose None for "
                    f"rank {rank} with {actions} ready"
                )
            now = min(end for end, _ in running.values())
            for rank in [rank for rank, (end, _) in running.items() if end == now]:
                self._ended[running.pop(rank)[1]] += 1
        return rows

    def _ready(self, rank: int) -> Iterator[tuple[str, tuple[int, str]]]:
        for stage in self._placement.stages_of(rank):
            for kind in self._kinds:
                microbatch = self._begun[stage, kind]
                needs = self._needs(stage, kind)
                if microbatch < self._microbatches and all(self._ended[n] > microbatch for n in needs):
                    yield f"{stage}{kind}{microbatch}", (stage, kind)

    def _needs(self, stage: int, kind: str) -> list[tuple[int, str]]:
        if kind == "W":
            return [(stage, "I")]
        if kind == "F":
            return [(stage - 1, "F")] if stage > 0 else []
        after = [(stage + 1, kind)] if stage + 1 < self._placement.num_stages else []
        return [(stage, "F"), *after]
