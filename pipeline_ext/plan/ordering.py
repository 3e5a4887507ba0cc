"""The arguments of a pipeline that decide the order of its tasks and messages, and its first plans."""

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from .. import _C
from ..base import arguments
from . import measured_slots, pack_choice, schedule_choice, slots, zero_bubble
from .build import AUTO, ScheduleLike, build_plan, resolve_zb_auto
from .costs import Costs
from .first_steps import FirstSteps

PackLike = int | str | Mapping[int, int | str]


class Ordering(NamedTuple):
    """These arguments, checked. The first steps resolve ``"auto"``."""

    schedule: ScheduleLike  # for "zb-auto" the order that was found
    num_stages: int
    num_ranks: int | None  # None: as many as the schedule takes
    microbatches: int
    packs: list[int] | None  # K of gradients by boundary; None: "auto"
    packs_forward: list[int] | None  # K of activations
    in_flight: list[int]  # the most microbatches at once, by stage; or empty
    finds_slots: bool  # in_flight="auto"
    costs: Costs | None  # for their memory_limit
    overlap: bool
    reactive: bool
    processes: bool  # each rank is one

    @classmethod
    def of(
        cls,
        schedule: ScheduleLike,
        *,
        num_stages: int,
        num_ranks: int | None,
        microbatches: int,
        pack: PackLike,
        pack_forward: PackLike,
        in_flight: int | Sequence[int] | Literal["auto"] | None,
        costs: Costs | None,
        overlap: bool,
        reactive: bool,
        graphs: bool,
        processes: bool = False,
    ) -> "Ordering":
        """Checks arguments of ``Pipeline``. Raises InvalidArgument and InvalidSchedule, as documented there."""
        packs = arguments.packs("pack", pack, num_stages - 1, microbatches)
        packs_forward = arguments.packs("pack_forward", pack_forward, num_stages - 1, microbatches)
        finds_slots = isinstance(in_flight, str) and in_flight == AUTO
        if finds_slots:
            slots.check(
                costs,
                bool(reactive),
                chooses=schedule == AUTO or packs is None or packs_forward is None,
                searches=schedule == zero_bubble.NAME,
                graphs=graphs,
            )
        most = arguments.in_flight(None if finds_slots else in_flight, num_stages)
        if schedule == AUTO:
            schedule_choice.check(packs, packs_forward, graphs)
        schedule = resolve_zb_auto(
            schedule,
            num_stages=num_stages,
            num_ranks=num_ranks,
            microbatches=microbatches,
            in_flight=most,
            costs=costs,
        )
        return cls(
            schedule,
            num_stages,
            num_ranks,
            microbatches,
            packs,
            packs_forward,
            most,
            finds_slots,
            costs,
            bool(overlap),
            bool(reactive),
            processes,
        )

    @property
    def weighs(self) -> bool:
        """Whether the first step measures the memory of activations."""
        return self.finds_slots and self.costs is not None and self.costs.act_memory is None

    def first_steps(self, skips: Sequence[_C.Skip] = ()) -> FirstSteps:
        """The first steps; they follow one plan if nothing is "auto". Raises InvalidSchedule."""
        plan_of = functools.partial(
            build_plan,
            num_stages=self.num_stages,
            microbatches=self.microbatches,
            num_ranks=self.num_ranks,
            overlap=self.overlap,
            reactive=self.reactive,
            skips=skips,
            in_flight=self.in_flight,
            memory=None if self.weighs else self.costs,
        )
        if self.schedule == AUTO:
            return schedule_choice.first_steps(
                functools.partial(plan_of, packs=self.packs, packs_forward=self.packs_forward),
                self.num_stages,
                self.num_ranks or self.num_stages,
                self.in_flight,
                self.costs,
            )
        own_room: Sequence[int] = ()
        if self.finds_slots:
            assert self.costs is not None  # slots.check
            with_packs = functools.partial(
                plan_of, self.schedule, packs=self.packs or (), packs_forward=self.packs_forward or ()
            )
            if self.weighs:
                return measured_slots.first_steps(with_packs, self.costs, self.processes)
            found = slots.choose_slots(lambda room: with_packs(room=room), self.costs, processes=self.processes)
            own_room = found.chosen.room
        return pack_choice.first_steps(
            lambda packs, packs_forward, room=(): plan_of(
                self.schedule, packs=packs, packs_forward=packs_forward, room=room or own_room
            ),
            self.packs,
            self.packs_forward,
            self.num_stages - 1,
        )
