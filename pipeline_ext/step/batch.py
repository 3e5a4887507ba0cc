"""The arguments and the results of a step."""

from typing import Any, NamedTuple

from torch import Tensor

from ..microbatches.cutting import Presplit, Whole


class Batch(NamedTuple):
    """The arguments of a step, on the devices of the stages that use them, and how to run it."""

    inputs: Whole | Presplit | None  # None: another process has the first stage
    target: Any
    keep_outputs: bool
    keep_losses: bool
    record: bool  # the times of tasks
    labels: Any = None  # what loss_weight counts in, where the model computes its loss and there is no target
    order: list[int] | None = None  # by place in the plan, which given microbatch enters there; None: as given


class Outcome(NamedTuple):
    """The results of a step."""

    loss: Tensor
    losses: list[Tensor | None]  # by microbatch, unweighted
    outputs: Any  # of the last stage for the whole batch; None if they were not kept
    result: Any  # the engine's ``StepResult``
