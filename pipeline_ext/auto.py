"""What ``"auto"`` stands for in a pipeline's arguments: which first steps it takes to choose."""

import functools
from collections.abc import Callable, Sequence

from . import _C, pack_choice, schedule_choice
from .first_steps import FirstSteps
from .planning import AUTO, ScheduleLike
from .simulation import Costs


def first_steps(
    schedule: ScheduleLike,
    plan_of: Callable[..., _C.Plan],
    *,
    num_stages: int,
    num_ranks: int,
    packs: list[int] | None,
    packs_forward: list[int] | None,
    in_flight: Sequence[int],
    memory: Costs | None,
    graphs: bool,
) -> FirstSteps:
    """The first steps of a pipeline, all of one plan where nothing is "auto".

    Args:
        plan_of: as ``build_plan``, with all that is not left to choose.
        packs, packs_forward: None for "auto".
        in_flight: the most microbatches by stage, or empty.
        memory: costs whose ``memory_limit`` is kept.

    Raises InvalidArgument for choices that do not go together.
    """
    if schedule == AUTO:
        schedule_choice.check(packs, packs_forward, graphs)
        return schedule_choice.first_steps(
            functools.partial(plan_of, packs=packs, packs_forward=packs_forward),
            num_stages,
            num_ranks,
            in_flight,
            memory,
        )
    return pack_choice.first_steps(
        lambda packs, packs_forward, room=(): plan_of(
            schedule, packs=packs, packs_forward=packs_forward, room=room
        ),
        packs,
        packs_forward,
        num_stages - 1,
    )
