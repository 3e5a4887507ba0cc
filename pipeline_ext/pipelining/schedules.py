"""The schedules of torch.distributed.pipelining, run by this engine.

A schedule inherits from torch's class of the same name, with its constructor, order and CSV files. Only the way
a step runs is replaced. All other names of the module are torch's own.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.pipelining import schedules as _torch
from torch.distributed.pipelining.stage import _PipelineStageBase

from ..errors import InvalidArgument
from .order import Order, named_order
from .runner import Runner
from .targets import loss_weights, split_target

__all__ = [
    "PipelineScheduleMulti",
    "PipelineScheduleSingle",
    "Schedule1F1B",
    "ScheduleDualPipeV",
    "ScheduleGPipe",
    "ScheduleInterleaved1F1B",
    "ScheduleInterleavedZeroBubble",
    "ScheduleLoopedBFS",
    "ScheduleZBVZeroBubble",
    "get_schedule_class",
]


def __getattr__(name: str) -> Any:
    return getattr(_torch, name)


class _OnEngine(_torch._PipelineSchedule):
    """Runs the steps of a torch schedule.

    With ``scale_grads`` a loss is the mean over its microbatch, and is weighted by its microbatch's share of
    the rows. Nothing is divided after the step, so gradients of earlier steps stay as they are.
    """

    _runner: Runner | None = None

    def _local_stages(self) -> list[_PipelineStageBase]:
        """The stages of this process."""
        raise NotImplementedError

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
        arg_mbs: list[tuple] | None = None,
        kwarg_mbs: list[dict[str, Any]] | None = None,
        target_mbs: list[Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs one batch forward and backward; adds the gradients to the parameters' ``.grad``.

        Args:
            args, kwargs: the whole batch, cut along dimension 0, or as the chunk specs say. The process of the
                first stage gives the positional arguments; keyword arguments go to the stages of the process
                that gives them.
            target: any pytree of tensors, cut along dimension 0; needed in the process of the last stage.
            losses: emptied and filled with each microbatch's loss, in the process of the last stage.
            return_outputs: whether that process returns the outputs.
            loss_kwargs: keyword arguments of the loss function.
            arg_mbs, kwarg_mbs, target_mbs: microbatches, as in torch 2.14, in place of ``args``, ``kwargs`` and
                ``target``.

        Returns:
            The merged outputs in the process of the last stage, None elsewhere.

        Raises:
            RuntimeError: under ``torch.no_grad()``.
            TypeError: for a microbatch whose arguments are no tuple, or whose keyword arguments are no dict.
            InvalidArgument: for a whole batch beside its microbatches.
            PipelineError: as ``Pipeline.step`` does.
        """
        needs_autograd = getattr(self, "_backward_requires_autograd", True)
        if self._has_backward and needs_autograd and not torch.is_grad_enabled():
            raise RuntimeError("step needs gradients to be enabled; under torch.no_grad() call eval")
        if arg_mbs is None and kwarg_mbs is None:
            arg_mbs, kwarg_mbs = self._split_inputs(args, kwargs)
        elif args or kwargs:
            raise InvalidArgument("a whole batch and its microbatches are both given; give one of them")
        _check_each(arg_mbs, "arg_mbs", tuple)
        _check_each(kwarg_mbs, "kwarg_mbs", dict)
        if target is not None:
            if target_mbs is not None:
                raise InvalidArgument("target and target_mbs are both given; give one of them")
            target_mbs = split_target(target, self._n_microbatches)
        self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs)
        for stage in self._local_stages():
            if stage.is_last and return_outputs:
                return self._merge_outputs(stage.output_chunks)
        return None

    def _step_microbatches(
        self,
        arg_mbs: list[tuple] | None = None,
        kwarg_mbs: list[dict[str, Any]] | None = None,
        target_mbs: list[Any] | None = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = True,
        loss_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """As ``step``, for a batch that is already cut into microbatches."""
        arg_mbs, kwarg_mbs = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
        self._internal_losses.clear()
        if self._runner is None:
            self._runner = Runner(self, self._local_stages())
        self._runner.run(
            self,
            list(zip(arg_mbs, kwarg_mbs)),
            target_mbs,
            losses,
            loss_kwargs,
            weights=loss_weights(target_mbs, self._n_microbatches, self.scale_grads),
            keep_outputs=return_outputs,
        )
        self._update_losses(self._local_stages(), losses)

    def _maybe_compute_loss(
        self,
        stage: Any,
        output: Any,
        target_mbs: list[Any] | None,
        mb_index: int,
        loss_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Stores a microbatch's loss under its index, in any order of microbatches."""
        if not stage.is_last or self._loss_fn is None or (target_mbs is None and not self._has_backward):
            return
        target = None if target_mbs is None else target_mbs[mb_index]
        missing = mb_index + 1 - len(self._internal_losses)
        self._internal_losses.extend([None] * missing)  # type: ignore[list-item]  # until they are computed
        self._internal_losses[mb_index] = self._compute_loss(output, target, loss_kwargs)

    def _compute_loss(self, output: Any, target: Any, loss_kwargs: dict[str, Any] | None = None) -> Any:
        """Calls the loss function. Torch 2.11 gives it no keyword arguments."""
        assert self._loss_fn is not None
        return self._loss_fn(output, target, **(loss_kwargs or {}))


def _check_each(parts: list[Any] | None, name: str, kind: type) -> None:
    """Raises TypeError for another type: a tensor's rows would be taken for the arguments."""
    for m, part in enumerate(parts or ()):
        if not isinstance(part, kind):
            raise TypeError(
                f"{name}[{m}] is a {type(part).__name__}; give a {kind.__name__} for each microbatch"
            )


class PipelineScheduleSingle(_OnEngine, _torch.PipelineScheduleSingle):
    """Base of the schedules with one stage per process."""

    def _local_stages(self) -> list[_PipelineStageBase]:
        return [self._stage]


class _ScheduleForwardOnly(PipelineScheduleSingle, _torch._ScheduleForwardOnly):
    """Runs forward only."""


class ScheduleGPipe(PipelineScheduleSingle, _torch.ScheduleGPipe):
    """All microbatches forward, then all backward."""

    def _get_pipeline_order(self) -> Order:
        return named_order("gpipe", self._num_stages, self._n_microbatches)


class Schedule1F1B(PipelineScheduleSingle, _torch.Schedule1F1B):
    """One forward, one backward; also with fewer microbatches than stages."""

    @functools.wraps(_torch.Schedule1F1B.__init__)  # type: ignore[misc]  # mypy knows no decorated constructor
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super(_torch.Schedule1F1B, self).__init__(*args, **kwargs)  # skips the check that refuses so few

    def _get_pipeline_order(self) -> Order:
        # The order that torch 2.13 returns here lacks the last stage's first forward; torch runs another.
        return named_order("1f1b", self._num_stages, self._n_microbatches)


class PipelineScheduleMulti(_OnEngine, _torch.PipelineScheduleMulti):
    """Base of the schedules with several stages per process; ``_load_csv`` sets another order."""

    def __init__(
        self, *args: Any, defer_pp_recv: bool = False, reuse_recv_buffers: bool = False, **kwargs: Any
    ) -> None:
        """Takes torch's arguments, and ignores two of later torch: the engine always does what they ask."""
        super().__init__(*args, **kwargs)

    def _local_stages(self) -> list[_PipelineStageBase]:
        return self._stages

    def _validate_and_set_stage_mapping(self, actions: dict[int, list]) -> None:
        super()._validate_and_set_stage_mapping(actions)
        if self._runner is not None:  # it runs the order of before
            self._runner.close()
            self._runner = None


class _PipelineScheduleRuntime(PipelineScheduleMulti, _torch._PipelineScheduleRuntime):
    """Runs any order, with or without its sends and receives, and custom functions in place of actions."""

    def _load_actions(
        self,
        actions: dict[int, list],
        format: Literal["compute_only", "compute_comms"] = "compute_only",
    ) -> None:
        """Torch 2.13 calls it ``_prepare_schedule_with_comms``."""
        self._prepare_schedule_with_comms(actions, format)


class ScheduleLoopedBFS(_PipelineScheduleRuntime, _torch.ScheduleLoopedBFS):
    """Breadth first: all microbatches at one stage, then all at the next."""


class ScheduleInterleaved1F1B(_PipelineScheduleRuntime, _torch.ScheduleInterleaved1F1B):
    """1F1B with several stages per process."""


class ScheduleInterleavedZeroBubble(_PipelineScheduleRuntime, _torch.ScheduleInterleavedZeroBubble):
    """Interleaved 1F1B that computes weight gradients where a process would wait."""


class ScheduleZBVZeroBubble(_PipelineScheduleRuntime, _torch.ScheduleZBVZeroBubble):
    """Zero bubble, with two stages per process in V shape."""


class ScheduleDualPipeV(_PipelineScheduleRuntime, _torch.ScheduleDualPipeV):
    """Pairs of a forward and a backward of different microbatches, in V shape."""


_SCHEDULES: dict[str, type] = {
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "GPipe": ScheduleGPipe,
    "LoopedBFS": ScheduleLoopedBFS,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "PipelineScheduleSingle": PipelineScheduleSingle,
    "PipelineScheduleMulti": PipelineScheduleMulti,
    "ZBVZeroBubble": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}


def get_schedule_class(schedule_name: str) -> type:
    """The class with this name, in upper or lower case. Raises ValueError if there is none."""
    for name, schedule in _SCHEDULES.items():
        if name.lower() == schedule_name.lower():
            return schedule
    raise ValueError(f"there is no schedule {schedule_name!r}; give one of {list(_SCHEDULES)}")
