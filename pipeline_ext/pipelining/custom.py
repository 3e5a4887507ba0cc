"""Custom functions: what one finds on its schedule and stages, and what its calls do."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor
from torch.distributed.pipelining.schedules import (
    _Action,
    _ComputationType,
    _PipelineContext,
    _PipelineScheduleRuntime,
)

from . import sharding
from .torch_stage import TorchStage

_TAKES_GRADIENTS = (_ComputationType.FULL_BACKWARD, _ComputationType.BACKWARD_INPUT)


class Calls:
    """A stage's methods as a custom function calls them, in place of torch's own while a step runs.

    A stage sends what its neighbours in other processes need. Between stages of one process the function takes
    it from one and gives it to the other, as in torch: ``set_local_fwd_input``, ``get_local_bwd_output``,
    ``set_local_bwd_input``.
    """

    def __init__(self, stage: TorchStage, stages: dict[int, TorchStage], trains: bool) -> None:
        self._stage = stage
        self._trains = trains
        self._before = stages.get(stage.index - 1)
        self._next = stages.get(stage.index + 1)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple,
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Runs the module; ``args`` are the first stage's. Returns what it returned."""
        output = self._stage.compute(fwd_chunk_id, args, kwargs or {})
        if self._next is None and not self._stage.torch_stage.is_last:
            self._stage.send_value(fwd_chunk_id, output)
        return output

    def backward_one_chunk(
        self,
        bwd_chunk_id: int,
        loss: Tensor | None = None,
        full_backward: bool = True,
        last_backward: bool = False,
    ) -> None:
        """Runs the backward, or what leads to the inputs. ``loss`` is the last stage's."""
        if not self._trains:
            return
        differentiate = self._stage.differentiate if full_backward else self._stage.differentiate_inputs
        differentiate(bwd_chunk_id, loss)
        if self._before is None:
            self._stage.send_gradients(bwd_chunk_id, self._stage.take_gradients(bwd_chunk_id))
        if full_backward:
            self._stage.finish(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Runs the rest of the backward."""
        if self._trains:
            self._stage.weight_gradient(bwd_chunk_id)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Takes what the stage before has made."""
        assert self._before is not None
        self._before.send_value(mb_index, prev_stage_outputs)

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """Gradients for the stage before: of each tensor that requires one."""
        return tuple(self._stage.take_gradients(mb_index))

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Takes the gradients that the next stage has found."""
        assert self._next is not None
        self._next.send_gradients(mb_index, list(next_stage_bwd_outputs))

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Has FSDP reduce. Losses have their weights already, so nothing is scaled."""
        sharding.reduce(self._stage)

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Losses have their weights already."""


_CALLS = [name for name in vars(Calls) if not name.startswith("_")]


@contextlib.contextmanager
def calls_in_place(stages: dict[int, TorchStage], trains: bool) -> Iterator[None]:
    """Within it the methods of torch's stages are ``Calls``."""
    for stage in stages.values():
        stage.torch_stage.has_backward = trains
        calls = Calls(stage, stages, trains)
        for name in _CALLS:
            setattr(stage.torch_stage, name, getattr(calls, name))
    try:
        yield
    finally:
        for stage in stages.values():
            for name in _CALLS:
                delattr(stage.torch_stage, name)


def call(function: Any, action: _Action, context: _PipelineContext, local: Collection[int]) -> None:
    """Calls a custom function for an action whose input has come; ``local`` are this process's stages."""
    schedule = context.schedule_ref
    assert isinstance(schedule, _PipelineScheduleRuntime)  # no other has custom functions
    for part in action.sub_actions or (action,):
        if part.microbatch_index is None:
            continue  # no task, which alone receives
        key = (part.stage_index, part.microbatch_index)
        if part.computation_type == _ComputationType.FORWARD and part.stage_index - 1 not in local:
            schedule.fwd_recv_ops[key] = []  # nothing to wait for
        elif part.computation_type in _TAKES_GRADIENTS and part.stage_index + 1 not in local:
            schedule.bwd_recv_ops[key] = []
    try:
        function(action, context)
    finally:
        schedule.fwd_recv_ops.clear()
        schedule.bwd_recv_ops.clear()
