"""A schedule's order as this engine plans it, and what is listed around its tasks."""

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


Order = dict[int, list[_Action | None]]  # by rank, as in torch; None where it waits


class Cell(NamedTuple):
    """An action that computes, or a pair of them."""

    action: _Action
    before: list[_Action]  # gathering, letting go, reducing
    after: list[_Action]

    @property
    def parts(self) -> Sequence[_Action]:
        return self.action.sub_actions or (self.action,)


def order_of(schedule: Any) -> dict[int, list[Cell]] | None:
    """By rank; None for a schedule that has no order, and runs forward alone.

    Messages are left out: they go when they are ready, and hold nothing up.
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
    """That of one of this package's schedules, a stage on each rank."""
    plan = _C.make_plan(name, num_stages, num_stages, microbatches)
    return {rank: [_Action.from_str(cell) for cell in row] for rank, row in plan.order().items()}


def texts(order: dict[int, list[Cell]]) -> list[list[str]]:
    """What computes, by rank."""
    return [[str(cell.action) for cell in order[rank]] for rank in sorted(order)]


def _cells(row: list[_Action]) -> list[Cell]:
    """What is listed after an action belongs to it: it does not wait for the next one's input."""
    cells: list[Cell] = []
    before: list[_Action] = []
    for action in row:
        if action.is_compute_op:
            cells.append(Cell(action, before, []))
            before = []
        else:
            (cells[-1].after if cells else before).append(action)
    return cells
