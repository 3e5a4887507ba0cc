"""Builds a plan from a schedule's name, its CSV file, its actions or a Policy."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from .. import _C
from ..base import arguments
from ..base.texts import read_text
from ..errors import InvalidArgument, InvalidSchedule
from . import zero_bubble
from .costs import Costs
from .policy import Policy

ScheduleLike = str | os.PathLike | Policy | Mapping[int, Sequence[str]] | Sequence[Sequence[str]]

AUTO = "auto"  # as a schedule: the best one at the costs; as in_flight: what memory allows


class _Mode(TypedDict):
    """How a plan runs; see ``build_plan``."""

    overlap: bool
    reactive: bool
    packs: list[int]
    packs_forward: list[int]
    skips: list[_C.Skip]
    in_flight: list[int]
    room: list[int]


def schedule_names() -> list[str]:
    """The names of all schedules."""
    return [*_C.schedule_names(), zero_bubble.NAME]


def layout_of(schedule: str, num_stages: int, num_ranks: int) -> str:
    """How a named schedule places stages: linear, looped, v or bidirectional. Raises InvalidSchedule."""
    if schedule == zero_bubble.NAME:
        return zero_bubble.layout(num_stages, num_ranks)
    return _C.layout_of(schedule)


def build_plan(
    schedule: ScheduleLike,
    *,
    num_stages: int,
    microbatches: int,
    num_ranks: int | None = None,
    overlap: bool = False,
    reactive: bool = False,
    packs: Sequence[int] = (),
    packs_forward: Sequence[int] = (),
    skips: Sequence[_C.Skip] = (),
    in_flight: int | Sequence[int] | None = None,
    room: Sequence[int] = (),
    memory: Costs | None = None,
    costs: Costs | None = None,
) -> _C.Plan:
    """The plan of one step.

    Args:
        schedule: a name from ``schedule_names()``; the path of a CSV file with a line of actions for each
            rank; the actions of each rank as text, by rank; or a Policy.
        num_stages: stages of the model.
        microbatches: microbatches of one step.
        num_ranks: ranks; by default one for each stage, or for each two stages if the schedule holds several
            stages on a rank.
        overlap: let the forward and the backward stream of a rank run at the same time.
        reactive: let a rank run another task that is ready while its next planned task is not. Otherwise the
            plan keeps the order given, or is refused.
        packs, packs_forward: K by boundary: how many microbatches' gradients, and activations, one message
            carries; empty: 1.
        skips: skip connections, which go from a stage straight to a later one, as in ``Skip(0, 3, pack=2)``.
        in_flight: the most microbatches that a stage may hold at once, one number or a list by stage; None or
            empty: as many as the schedule takes.
        room: the least number of microbatches that each stage may hold, by stage, as far as ``in_flight``
            allows it; empty: no more than the schedule takes.
        memory: costs whose ``memory_limit`` the plan keeps wherever it runs; None: no limit. An order that
            exceeds the limit is refused; reactive ranks start their ``F`` in the planned order, each when the
            microbatch fits.
        costs: the costs at which ``"zb-auto"`` searches; None: F = I = W = 1 at each stage.

    Raises:
        InvalidArgument: for numbers that are not valid.
        InvalidSchedule: if the schedule does not exist, does not fit, or would never end.
    """
    num_stages = arguments.count("num_stages", num_stages)
    microbatches = arguments.count("microbatches", microbatches)
    if num_ranks is not None:
        num_ranks = arguments.count("num_ranks", num_ranks, _C.most_stages)
    check_size(num_stages, microbatches)
    for skip in skips:
        arguments.check_type("one of skips", skip, _C.Skip)
    for name, value in (("memory", memory), ("costs", costs)):
        if value is not None:
            arguments.check_type(name, value, Costs)
    if isinstance(schedule, str):
        schedule = arguments.encodable(schedule)

    def by_boundary(name: str, packs: Sequence[int]) -> list[int]:
        accepted = (
            f"a list of whole numbers from 1 to the {microbatches} microbatches, one for each of the "
            f"{num_stages - 1} boundaries"
        )
        found = arguments.numbers(name, packs, num_stages - 1, accepted, microbatches)
        return found if any(k > 1 for k in found) else []

    by_stage = f"a list of whole numbers of at least 1, one for each of the {num_stages} stages"
    mode: _Mode = {
        "overlap": bool(overlap),
        "reactive": bool(reactive),
        "packs": by_boundary("packs", packs),
        "packs_forward": by_boundary("packs_forward", packs_forward),
        "skips": list(skips),
        "in_flight": arguments.in_flight(in_flight, num_stages),
        "room": arguments.numbers("room", room, num_stages, by_stage),
    }

    def limits(num_ranks: int) -> _C.Memory | None:
        if memory is None or memory.memory_limit is None:
            return None
        return memory.by_stage(num_stages, num_ranks).memory(num_stages)

    schedule = resolve_zb_auto(
        schedule,
        num_stages=num_stages,
        num_ranks=num_ranks,
        microbatches=microbatches,
        in_flight=mode["in_flight"],
        costs=costs,
    )
    path = _csv_path(schedule)
    if path is not None or not isinstance(schedule, str | Policy):
        cells = _cells(schedule) if path is None else _C.cells_of_csv(read_text("the schedule", path))
        plan = _C.plan_of_cells(cells, **mode, memory=limits(len(cells)))
    else:
        ranks = default_ranks(schedule, num_stages) if num_ranks is None else num_ranks
        if isinstance(schedule, str):
            return _C.make_plan(schedule, num_stages, ranks, microbatches, **mode, memory=limits(ranks))
        plan = schedule.plan(num_stages, ranks, microbatches, {**mode, "memory": limits(ranks)})
    for what, given, found in (
        ("num_stages", num_stages, plan.num_stages),
        ("microbatches", microbatches, plan.num_microbatches),
        ("the number of devices", num_ranks, plan.num_ranks),
    ):
        if given is not None and given != found:
            raise InvalidSchedule(f"{what} is {given}, but the schedule given has {found}")
    return plan


def resolve_zb_auto(
    schedule: ScheduleLike,
    *,
    num_stages: int,
    num_ranks: int | None,
    microbatches: int,
    in_flight: Sequence[int],
    costs: Costs | None,
) -> ScheduleLike:
    """Replaces ``"zb-auto"`` by an order, which a search finds in seconds; returns other schedules unchanged.

    Args:
        num_ranks: None: as many as stages.
        in_flight: the most microbatches that each stage may hold at once, or empty. If ``costs`` have no
            ``memory_limit``, the search limits each rank to what its stages may hold together.
        costs: None: F = I = W = 1 at each stage.

    Raises InvalidSchedule for costs or ranks that do not fit, or if no order keeps the memory limit.
    """
    if schedule != zero_bubble.NAME:
        return schedule
    num_ranks, costs = num_ranks or num_stages, costs or Costs()
    if in_flight and costs.memory_limit is None:
        home = zero_bubble.rank_of_stage(num_stages, num_ranks)
        costs = costs.with_memory_of(Costs(memory_limit=slots_of_ranks(in_flight, home)))
    found = zero_bubble.find_order(
        costs,
        num_stages=num_stages,
        num_ranks=num_ranks,
        microbatches=microbatches,
        span=True,
        work=zero_bubble.WORK,
    )
    if found.interrupted:
        raise KeyboardInterrupt
    if not in_flight:
        return found.cells
    settled = _C.plan_of_cells(found.cells, reactive=True, in_flight=in_flight)
    return list(settled.order().values())


def slots_of_ranks(in_flight: Sequence[int], rank_of_stage: Sequence[int]) -> list[float]:
    """The microbatches that the stages of a rank may hold together, by rank; ``in_flight`` is by stage."""
    slots = [0.0] * (1 + max(rank_of_stage))
    for rank, most in zip(rank_of_stage, in_flight):
        slots[rank] += most
    return slots


def check_size(num_stages: int, microbatches: int) -> None:
    """Raises InvalidArgument for more tasks than a plan holds, before memory is allocated for them."""
    if 2 * num_stages * microbatches > _C.most_tasks:  # F and B
        raise InvalidArgument(
            f"{microbatches} microbatches at {num_stages} stages are more tasks than the {_C.most_tasks} "
            "that a plan holds; give fewer"
        )
    if num_stages > _C.most_stages:
        raise InvalidArgument(
            f"{num_stages} stages are more than the {_C.most_stages} that a plan holds; give fewer"
        )


def check_trainable(plan: _C.Plan) -> None:
    """Raises InvalidSchedule for a plan that can be simulated, but not trained with."""
    if plan.rank_of_copy:
        raise InvalidSchedule(
            "the schedule keeps two copies of each stage's parameters, which can be planned and simulated but "
            "not run; 'dualpipev' is the same idea with one copy"
        )
    if not plan.has_backward:
        raise InvalidSchedule("the schedule has no backward action (B, or I and W), so it would train nothing")


def default_ranks(schedule: str | Policy, num_stages: int) -> int:
    """The number of ranks for a schedule when none is given."""
    if schedule == zero_bubble.NAME:
        return num_stages
    layout = schedule.placement if isinstance(schedule, Policy) else _C.layout_of(schedule)
    if layout in ("linear", "bidirectional") or (layout == "looped" and num_stages == 1):
        return num_stages
    if num_stages % 2:
        name = repr(schedule) if isinstance(schedule, str) else f"a policy placed {layout!r}"
        by_default, or_else = (" by default", ". Give devices= to hold another number")
        if layout == "v":
            by_default = or_else = ""
        raise InvalidSchedule(
            f"{name} holds two stages on each rank{by_default}, so num_stages is even; got "
            f"{num_stages}{or_else}"
        )
    return num_stages // 2


def _csv_path(schedule: ScheduleLike) -> Path | None:
    if isinstance(schedule, os.PathLike):
        return Path(schedule)
    if isinstance(schedule, str) and schedule.endswith(".csv"):
        return Path(schedule)
    return None


def _cells(schedule: object) -> list[list[str]]:
    rows = schedule
    if isinstance(schedule, Mapping):
        if set(schedule) != set(range(len(schedule))):
            raise InvalidSchedule(
                f"the schedule's ranks are {list(schedule)!r:.200}; number them from 0 without gaps"
            )
        rows = [schedule[rank] for rank in range(len(schedule))]
    if (
        not isinstance(rows, Sequence)
        or isinstance(rows, bytes)
        or not all(isinstance(row, Sequence) and not isinstance(row, str) for row in rows)
        or not all(isinstance(cell, str) for row in rows for cell in row)
    ):
        raise InvalidSchedule(
            "a schedule is a name, the path of a CSV file, a Policy, or for each rank a list of actions as "
            'text, as in [["0F0", "0B0"], ["1F0", "1B0"]]'
        )
    return [[arguments.encodable(cell) for cell in row] for row in rows]
