"""What can go wrong, as exceptions. Every one derives from PipelineError."""


class PipelineError(Exception):
    """Base of all errors of this package."""


class InvalidArgument(PipelineError, ValueError):
    """An argument that cannot be used. Raised before any work starts; nothing has changed."""


class InvalidSchedule(InvalidArgument):
    """A schedule, order or cost model that cannot be used; names the offending cell where there is one."""


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

    def __reduce__(self):
        place = (self.action, self.stage, self.microbatch, self.rank)
        return _stage_error, (str(self), *place)


def _stage_error(message: str, action: str, stage: int, microbatch: int, rank: int) -> StageError:
    """Remakes a pickled StageError."""
    return StageError(message, action=action, stage=stage, microbatch=microbatch, rank=rank)


class StepTimeout(PipelineError, TimeoutError):
    """A step made no progress for ``timeout`` seconds; the message lists who waits for what."""


class ReductionError(PipelineError, RuntimeError):
    """Replicas could not reduce their gradients: one of them failed, or they do not match."""


class PeerError(PipelineError, RuntimeError):
    """Another process of the pipeline failed, is gone, or does not match this one; the message names it."""


class DeadPipeline(PipelineError, RuntimeError):
    """The pipeline was used after it was closed, a stage's code never returned, or a GPU failed for good."""


class DeviceError(PipelineError, RuntimeError):
    """A GPU or its driver failed, or cannot be used; the message names the driver's function and error."""
