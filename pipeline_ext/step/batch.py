"""What a step is called with, and what it gives back."""

from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """What a step is called with, where the stages can use it, and how it is to run."""

    args: tuple
    kwargs: dict[str, Any]
    target: Any
    rows: int | None  # None: another process has the first stage
    keep_outputs: bool
    keep_losses: bool
    record: bool  # when tasks run


class Outcome(NamedTuple):
    """What a step gives back."""

    loss: Tensor
    losses: list[Tensor | None]  # by microbatch, unweighted
    outputs: Any  # of the last stage for the whole batch; None where they were not kept
    result: Any  # the engine's
