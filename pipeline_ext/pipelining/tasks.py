"""What the tasks of one process do: its stages' own work, or custom functions in place of it."""

import functools
from collections import Counter
from typing import Any

import torch
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineContext

from ..context import CallerContext
from ..engine import Bodies, Body
from . import custom, sharding
from .order import Cell
from .torch_stage import TorchStage

_FORWARD = _ComputationType.FORWARD


class Tasks:
    """The bodies of tasks, for a schedule of torch's."""

    def __init__(self, schedule: Any, stages: dict[int, TorchStage], cells: list[Cell]) -> None:
        """``cells``: in the order in which this process runs them.

        The schedule itself is known during a step alone: the engine, which holds all this, ends with it.
        """
        self._stages = stages
        self._cell_of = {part: cell for cell in cells for part in cell.parts}
        self._functions = getattr(schedule, "_comp_type_to_function_map", {})
        self._counter: Counter[int] = getattr(schedule, "backward_counter", Counter())

    def bodies(self) -> Bodies:
        """Of a training step."""
        kinds = {(part.stage_index, part.computation_type) for part in self._cell_of}
        return {(s, kind.value): functools.partial(self._run, s, kind) for s, kind in kinds}

    def eval_bodies(self) -> Bodies:
        """Of an evaluation."""
        return {(s, "F"): functools.partial(self._evaluate, s) for s in self._stages}

    def begin(self, context: _PipelineContext, caller: CallerContext) -> None:
        """Prepares for a step. ``context`` is for custom functions."""
        self._schedule = context.schedule_ref
        self._context = context
        self._caller = caller
        self._counter.clear()
        if hasattr(self._schedule, "unshard_ops"):  # a step that failed may have left some
            self._schedule.unshard_ops.clear()
            self._schedule.unsharded_stages.clear()

    def end(self) -> None:
        """Lets go of everything that belongs to the step."""
        del self._schedule, self._context, self._caller

    def _run(self, stage: int, kind: _ComputationType, m: int) -> None:
        part = _Action(stage, kind, m)
        cell = self._cell_of[part]
        function = self._functions.get(cell.action.computation_type)
        if part == cell.parts[0]:
            for action in cell.before:
                self._attend_to(action)
        if function is None:
            self._perform(part)
        elif part == cell.parts[-1]:  # now the input of all parts has come
            self._call(function, cell.action)
        if part == cell.parts[-1]:
            for action in cell.after:
                self._attend_to(action)

    def _evaluate(self, stage: int, m: int) -> None:
        function = self._functions.get(_FORWARD)
        if function is None:
            self._stages[stage].evaluate(m)
        else:
            with torch.no_grad():
                self._call(function, _Action(stage, _FORWARD, m))
            self._stages[stage].release(m)

    def _perform(self, action: _Action) -> None:
        stage = self._stages[action.stage_index]
        if hasattr(self._schedule, "_assert_unsharded"):
            self._schedule._assert_unsharded(stage.torch_stage)
        if action.computation_type in (_ComputationType.FULL_BACKWARD, _ComputationType.BACKWARD_WEIGHT):
            self._counter[stage.index] += 1
        task: dict[_ComputationType, Body] = {
            _FORWARD: stage.forward,
            _ComputationType.FULL_BACKWARD: stage.backward,
            _ComputationType.BACKWARD_INPUT: stage.input_gradient,
            _ComputationType.BACKWARD_WEIGHT: stage.weight_gradient,
        }
        task[action.computation_type](action.microbatch_index)

    def _attend_to(self, action: _Action) -> None:
        """Runs what is listed beside the tasks: for FSDP, or a custom function."""
        stage = self._stages[action.stage_index]
        if action.computation_type in self._functions:
            self._call(self._functions[action.computation_type], action)
        elif action.computation_type == _ComputationType.UNSHARD:
            for work in sharding.unshard(stage.module):
                self._schedule.unshard_ops[action.stage_index].append(work)
        elif action.computation_type == _ComputationType.RESHARD:
            sharding.reshard(stage.module)
            self._schedule.unsharded_stages.discard(action.stage_index)
        else:
            sharding.reduce(stage)

    def _call(self, function: Any, action: _Action) -> None:
        with self._caller.forward():
            custom.call(function, action, self._context, self._stages.keys())
