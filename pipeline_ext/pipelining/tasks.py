"""What the tasks of one process do: its stages' own work, or custom functions in place of it."""

import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineContext

from ..engines.protocol import Bodies, Body
from ..stages.context import CallerContext
from . import custom, sharding
from .order import Cell
from .torch_stage import TorchStage

_FORWARD = _ComputationType.FORWARD
_ENDS_BACKWARD = (_ComputationType.FULL_BACKWARD, _ComputationType.BACKWARD_WEIGHT)


class _Task(NamedTuple):
    """A task of this process, and its place in the order."""

    action: _Action
    body: Body
    cell: Cell
    begins: bool  # its cell
    ends: bool


class Tasks:
    """The bodies of tasks, for a schedule of torch's."""

    def __init__(self, schedule: Any, stages: dict[int, TorchStage], cells: list[Cell]) -> None:
        """``cells``: in the order in which this process runs them.

        The schedule itself is known during a step alone: the engine, which holds all this, ends with it.
        """
        self._stages = stages
        self._cells = cells
        device = next(iter(stages.values())).torch_stage.device
        self._gpu = device if device.type == "cuda" else None
        self._functions = getattr(schedule, "_comp_type_to_function_map", {})
        self._counter: Counter[int] = getattr(schedule, "backward_counter", Counter())

    def bodies(self) -> Bodies:
        """Of a training step."""
        tasks: dict[tuple[int, str], dict[int, _Task]] = {}
        for cell in self._cells:
            for part in cell.parts:
                begins, ends = part is cell.parts[0], part is cell.parts[-1]
                task = _Task(part, self._body_of(part), cell, begins, ends)
                kind = (part.stage_index, part.computation_type.value)
                tasks.setdefault(kind, {})[part.microbatch_index] = task
        return {kind: functools.partial(self._run, of_kind) for kind, of_kind in tasks.items()}

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
        self._enter()
        task = tasks[m]
        cell = task.cell
        function = self._functions.get(cell.action.computation_type) if self._functions else None
        if task.begins:
            for action in cell.before:
                self._attend_to(action)
        if function is None:
            self._perform(task)
        elif task.ends:  # now the input of all parts has come
            self._call(function, cell.action)
        if task.ends:
            for action in cell.after:
                self._attend_to(action)

    def _evaluate(self, stage: int, m: int) -> None:
        self._enter()
        function = self._functions.get(_FORWARD)
        if function is None:
            self._stages[stage].evaluate(m)
        else:
            with torch.no_grad():
                self._call(function, _Action(stage, _FORWARD, m))
            self._stages[stage].release(m)

    def _enter(self) -> None:
        """Makes the stages' GPU the current one: a thread of the engine begins with the first."""
        if self._gpu is not None:
            torch.cuda.set_device(self._gpu)

    def _perform(self, task: _Task) -> None:
        stage = self._stages[task.action.stage_index]
        if hasattr(self._schedule, "_assert_unsharded"):
            self._schedule._assert_unsharded(stage.torch_stage)
        if task.action.computation_type in _ENDS_BACKWARD:
            self._counter[stage.index] += 1
        task.body(task.action.microbatch_index)

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
