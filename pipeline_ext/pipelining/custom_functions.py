"""Custom functions: what they find on their schedule and its stages, and what their calls do."""

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


class StageMethods:
    """The methods of a torch stage that a custom function calls, replaced while a step runs.

    A stage sends what its neighbours in other processes need. Between stages of one process the custom function
    carries the values, as in torch, by ``set_local_fwd_input``, ``get_local_bwd_output`` and
    ``set_local_bwd_input``.
    """

    def __init__(self, stage: TorchStage, stages: dict[int, TorchStage], trains: bool) -> None:
        self._stage = stage
        self._trains = trains
        self._previous = stages.get(stage.index - 1)
        self._next = stages.get(stage.index + 1)

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple,
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Runs the module and returns its output. ``args`` are used by the first stage only."""
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
        """Runs the full backward, or only its input gradients. ``loss`` is used by the last stage only."""
        if not self._trains:
            return
        differentiate = self._stage.differentiate if full_backward else self._stage.differentiate_inputs
        differentiate(bwd_chunk_id, loss)
        if self._previous is None:
            self._stage.send_gradients(bwd_chunk_id, self._stage.take_gradients(bwd_chunk_id))
        if full_backward:
            self._stage.finish(bwd_chunk_id)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Runs the weight gradients."""
        if self._trains:
            self._stage.weight_gradient(bwd_chunk_id)

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Takes the output of the previous stage."""
        assert self._previous is not None
        self._previous.send_value(mb_index, prev_stage_outputs)

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        """The gradients for the previous stage: one for each tensor that requires one."""
        return tuple(self._stage.take_gradients(mb_index))

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        """Takes the gradients from the next stage."""
        assert self._next is not None
        self._next.send_gradients(mb_index, list(next_stage_bwd_outputs))

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Lets FSDP reduce. Scales nothing: losses are weighted already."""
        sharding.reduce(self._stage)

    def scale_grads(self, grad_scale_factor: int) -> None:
        """Does nothing: losses are weighted already."""


_REPLACED = [name for name in vars(StageMethods) if not name.startswith("_")]


@contextlib.contextmanager
def replaced_methods(stages: dict[int, TorchStage], trains: bool) -> Iterator[None]:
    """Within it the torch stages have the methods of ``StageMethods``."""
    for stage in stages.values():
        stage.torch_stage.has_backward = trains
        methods = StageMethods(stage, stages, trains)
        for name in _REPLACED:
            setattr(stage.torch_stage, name, getattr(methods, name))
    try:
        yield
    finally:
        for stage in stages.values():
            for name in _REPLACED:
                delattr(stage.torch_stage, name)


def call(function: Any, action: _Action, context: _PipelineContext, local: Collection[int]) -> None:
    """Calls a custom function for an action whose inputs have arrived; ``local`` are this process's stages."""
    schedule = context.schedule_ref
    assert isinstance(schedule, _PipelineScheduleRuntime)  # no other has custom functions
    for part in action.sub_actions or (action,):
        if part.microbatch_index is None:
            continue  # it computes nothing, so it receives nothing
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
