"""What the tasks of one process run: its stages, or custom functions in their place."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.pipelining.schedules import (
    _Action,
    _ComputationType,
    _PipelineContext,
    _PipelineScheduleRuntime,
)

from ..engines.protocol import Bodies, Body
from ..stages.context import CallerContext
from . import custom_functions, sharding
from .order import Cell
from .torch_stage import TorchStage

_FORWARD = _ComputationType.FORWARD
_ENDS_BACKWARD = (_ComputationType.FULL_BACKWARD, _ComputationType.BACKWARD_WEIGHT)


class _Task(NamedTuple):
    """A task of this process, and its place in its cell."""

    action: _Action
    body: Body
    cell: Cell
    is_first: bool
    is_last: bool


class Tasks:
    """The bodies of a torch schedule's tasks."""

    def __init__(self, schedule: Any, stages: dict[int, TorchStage], cells: list[Cell]) -> None:
        """``cells`` are in the order in which this process runs them.

        Holds the schedule during a step only: the engine holds this object, and must not keep the schedule
        alive.
        """
        self._stages = stages
        self._cells = cells
        device = next(iter(stages.values())).torch_stage.device
        self._gpu = device if device.type == "cuda" else None
        self._functions: dict[_ComputationType, Callable] = {}
        self._counter: Counter[int] = Counter()
        if isinstance(schedule, _PipelineScheduleRuntime):
            self._functions = schedule._comp_type_to_function_map
            self._counter = schedule.backward_counter

    def bodies(self) -> Bodies:
        """The bodies of a training step."""
        tasks: dict[tuple[int, str], dict[int, _Task]] = {}
        for cell in self._cells:
            for part in cell.parts:
                is_first, is_last = part is cell.parts[0], part is cell.parts[-1]
                task = _Task(part, self._body_of(part), cell, is_first, is_last)
                kind = (part.stage_index, part.computation_type.value)
                assert part.microbatch_index is not None  # it computes
                tasks.setdefault(kind, {})[part.microbatch_index] = task
        return {kind: functools.partial(self._run, of_kind) for kind, of_kind in tasks.items()}

    def eval_bodies(self) -> Bodies:
        """The bodies of an evaluation."""
        return {(s, "F"): functools.partial(self._evaluate, s) for s in self._stages}

    def begin(self, context: _PipelineContext, caller: CallerContext) -> None:
        """Prepares for a step; custom functions get ``context``."""
        self._schedule = context.schedule_ref
        self._context = context
        self._caller = caller
        self._counter.clear()
        if isinstance(self._schedule, _PipelineScheduleRuntime):  # a step that failed may have left some
            self._schedule.unshard_ops.clear()
            self._schedule.unsharded_stages.clear()

    def end(self) -> None:
        """Forgets the step."""
        del self._schedule, self._context, self._caller

    def _body_of(self, action: _Action) -> Body:
        stage = self._stages[action.stage_index]
        body: dict[_ComputationType, Body] = {
            _FORWARD: stage.forward,
            _ComputationType.FULL_BACKWARD: stage.backward,
            _ComputationType.BACKWARD_INPUT: stage.input_gradient,
            _ComputationType.BACKWARD_WEIGHT: stage.weight_gradient,
        }
        return body[action.computation_type]

    def _run(self, tasks: Mapping[int, _Task], m: int) -> None:
        self._set_device()
        task = tasks[m]
        cell = task.cell
        function = self._functions.get(cell.action.computation_type) if self._functions else None
        if task.is_first:
            for action in cell.before:
                self._run_listed(action)
        if function is None:
            self._compute(task, m)
        elif task.is_last:  # the inputs of all parts have arrived
            self._call(function, cell.action)
        if task.is_last:
            for action in cell.after:
                self._run_listed(action)

    def _evaluate(self, stage: int, m: int) -> None:
        self._set_device()
        function = self._functions.get(_FORWARD)
        if function is None:
            self._stages[stage].evaluate(m)
        else:
            with torch.no_grad():
                self._call(function, _Action(stage, _FORWARD, m))
            self._stages[stage].release(m)

    def _set_device(self) -> None:
        """Makes the stages' GPU the current one: the engine's threads start with GPU 0."""
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)

    def _compute(self, task: _Task, m: int) -> None:
        stage = self._stages[task.action.stage_index]
        if isinstance(self._schedule, _PipelineScheduleRuntime):
            self._schedule._assert_unsharded(stage.torch_stage)
        if task.action.computation_type in _ENDS_BACKWARD:
            self._counter[stage.index] += 1
        task.body(m)

    def _run_listed(self, action: _Action) -> None:
        """Runs an action listed around a cell: FSDP's, or the custom function for it."""
        stage = self._stages[action.stage_index]
        if action.computation_type in self._functions:
            self._call(self._functions[action.computation_type], action)
        elif action.computation_type == _ComputationType.REDUCE_GRAD:
            sharding.reduce(stage)
        else:
            self._gather(stage, action)

    def _gather(self, stage: TorchStage, action: _Action) -> None:
        """Gathers a stage's sharded parameters, or frees them."""
        assert isinstance(self._schedule, _PipelineScheduleRuntime)  # no other lists these actions
        if action.computation_type == _ComputationType.UNSHARD:
            for work in sharding.unshard(stage.module):
                self._schedule.unshard_ops[stage.index].append(work)
        else:
            sharding.reshard(stage.module)
            self._schedule.unsharded_stages.discard(stage.index)

    def _call(self, function: Any, action: _Action) -> None:
        with self._caller.forward():
            custom_functions.call(function, action, self._context, self._stages.keys())
