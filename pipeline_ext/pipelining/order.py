"""The order in which a torch schedule runs its actions, as this engine plans it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch.distributed.pipelining import schedules as _torch
from torch.distributed.pipelining.schedules import _Action, _ComputationType

from .. import _C

_MESSAGES = {
    _ComputationType.SEND_F,
    _ComputationType.RECV_F,
    _ComputationType.SEND_B,
    _ComputationType.RECV_B,
}

Order = dict[int, list[_Action | None]]  # by rank, as in torch; None where the rank waits


class Cell(NamedTuple):
    """An action that computes, or an overlapped pair of them, with the actions for FSDP listed around it."""

    action: _Action
    before: list[_Action]
    after: list[_Action]

    @property
    def parts(self) -> Sequence[_Action]:
        return self.action.sub_actions or (self.action,)


def order_of(schedule: Any) -> dict[int, list[Cell]] | None:
    """The cells of each rank; None if the schedule has no order and only runs forward.

    Leaves sends and receives out: the engine sends a result as soon as it is ready.
    """
    rows = getattr(schedule, "pipeline_order_with_comms", None) or schedule.pipeline_order
    if rows is None:
        return None
    rows = {
        rank: [a for a in row if a is not None and a.computation_type not in _MESSAGES]
        for rank, row in rows.items()
    }
    if not any(a.computation_type == _ComputationType.REDUCE_GRAD for row in rows.values() for a in row):
        rows = {rank: _torch._add_reduce_grad(row, schedule._n_microbatches) for rank, row in rows.items()}
    return {rank: _cells(row) for rank, row in rows.items()}


def named_order(name: str, num_stages: int, microbatches: int) -> Order:
    """The order of a schedule of this package, with one stage on each rank."""
    plan = _C.make_plan(name, num_stages, num_stages, microbatches)
    return {rank: [_Action.from_str(cell) for cell in row] for rank, row in plan.order().items()}


def action_texts(order: dict[int, list[Cell]]) -> list[list[str]]:
    """The actions that compute as text, by rank."""
    return [[str(cell.action) for cell in order[rank]] for rank in sorted(order)]


def _cells(row: list[_Action]) -> list[Cell]:
    """Puts what is listed after an action into its cell, so that it does not wait for the next one's input."""
    cells: list[Cell] = []
    before: list[_Action] = []
    for action in row:
        if action.is_compute_op:
            cells.append(Cell(action, before, []))
            before = []
        else:
            (cells[-1].after if cells else before).append(action)
    return cells
