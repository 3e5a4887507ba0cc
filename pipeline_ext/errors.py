"""The exceptions that this package raises. All derive from PipelineError."""

from collections.abc import Callable


class PipelineError(Exception):
    """Base of all errors of this package."""


class InvalidArgument(PipelineError, ValueError):
    """An argument is not valid. Raised before anything runs; nothing has changed."""


class InvalidSchedule(InvalidArgument):
    """A schedule, an order or costs are not valid. The message names the cell of the schedule that is wrong."""


class StageError(PipelineError):
    """A stage's code raised. The original exception is ``__cause__``.

    Attributes: ``action`` (text, as in ``1B3``), ``stage``, ``microbatch``, ``rank``.
    """

    def __init__(self, message: str, *, action: str, stage: int, microbatch: int, rank: int):
        super().__init__(message)
        self.action = action
        self.stage = stage
        self.microbatch = microbatch
        self.rank = rank

    def __reduce__(self) -> tuple[Callable[..., "StageError"], tuple[str, str, int, int, int]]:
        return _stage_error, (str(self), self.action, self.stage, self.microbatch, self.rank)


def _stage_error(message: str, action: str, stage: int, microbatch: int, rank: int) -> StageError:
    """Builds a StageError again from its pickled parts."""
    return StageError(message, action=action, stage=stage, microbatch=microbatch, rank=rank)


class NonFiniteError(PipelineError, FloatingPointError):
    """A step's loss or gradients are not finite; raised with ``nonfinite="raise"``.

    Attributes: ``stage`` and ``microbatch``, where that began; None where it is not known.
    """

    def __init__(self, message: str, *, stage: int | None, microbatch: int | None):
        super().__init__(message)
        self.stage = stage
        self.microbatch = microbatch

    def __reduce__(self) -> tuple[Callable[..., "NonFiniteError"], tuple[str, int | None, int | None]]:
        return _non_finite_error, (str(self), self.stage, self.microbatch)


def _non_finite_error(message: str, stage: int | None, microbatch: int | None) -> NonFiniteError:
    """Builds a NonFiniteError again from its pickled parts."""
    return NonFiniteError(message, stage=stage, microbatch=microbatch)


class StepTimeout(PipelineError, TimeoutError):
    """A step made no progress for ``timeout`` seconds. The message lists the tasks that wait, and what for."""


class ReductionError(PipelineError, RuntimeError):
    """Replicas could not average their gradients: one of them failed, or their models differ."""


class PeerError(PipelineError, RuntimeError):
    """Another process of the pipeline failed, is gone, or has other settings. The message names it."""


class DeadPipeline(PipelineError, RuntimeError):
    """The pipeline cannot run again: it was closed, a stage's code never returned, or a GPU failed for good."""


class DeviceError(PipelineError, RuntimeError):
    """A GPU or its driver failed or cannot be used. The message names the driver's function and its error."""
