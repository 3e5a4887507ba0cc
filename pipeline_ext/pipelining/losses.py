"""A torch schedule's own losses, during a step."""

from typing import Any

from torch import Tensor
from torch.distributed.pipelining.stage import _PipelineStageBase


class Losses:
    """Lets stages compute and read the losses that a schedule keeps.

    Holds the schedule during a step only: the engine holds this object and must not keep the schedule alive.
    """

    def begin(self, schedule: Any, targets: list[Any] | None, loss_kwargs: dict[str, Any] | None) -> None:
        """Prepares for a step."""
        self._schedule = schedule
        self._targets = targets
        self._loss_kwargs = loss_kwargs

    def end(self) -> None:
        """Forgets the step."""
        del self._schedule, self._targets, self._loss_kwargs

    def compute(self, stage: _PipelineStageBase, m: int, output: Any) -> None:
        """Computes the loss of microbatch ``m``, if the schedule has a loss function for it."""
        self._schedule._maybe_compute_loss(stage, output, self._targets, m, self._loss_kwargs)

    def of(self, stage: _PipelineStageBase, m: int) -> Tensor | None:
        """The loss of microbatch ``m``; None except for the last stage."""
        return self._schedule._maybe_get_loss(stage, m)
