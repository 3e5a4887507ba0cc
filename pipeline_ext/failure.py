"""A step's failure, as the exception the user sees."""

from . import _C
from .errors import DeadPipeline, StageError, StepTimeout

NO_GRADIENTS = (
    "every .grad of the model is None; buffers and random state may have advanced"
)

_KINDS = {"F": "forward", "B": "backward"}


def stage_error(
    plan: _C.Plan, result: _C.StepResult, dead: bool, training: bool
) -> BaseException:
    """The exception for a step in which a stage's code raised, chained to the original one."""
    error = result.error
    action = plan.action(result.failed_task)
    kind, stage, m, rank, _ = plan.describe(result.failed_task)
    where = f"{action}, the {_KINDS[kind]} of microbatch {m} at stage {stage} on rank {rank}"
    state = _state(dead, training)
    if not isinstance(error, Exception):  # KeyboardInterrupt and its like stay what they are
        error.add_note(f"raised in {where}; {state}")
        return error
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", []))
    failure = StageError(
        f"{where}, raised {type(error).__name__}: {error}{notes}; {state}",
        action=action,
        stage=stage,
        microbatch=m,
        rank=rank,
    )
    failure.__cause__ = error
    return failure


def closed_error(training: bool) -> DeadPipeline:
    """The exception for a step during which the pipeline was closed."""
    state = f"; {NO_GRADIENTS}" if training else ""
    return DeadPipeline(f"the pipeline was closed while a step ran{state}")


def timeout_error(
    result: _C.StepResult, timeout: float, dead: bool, training: bool
) -> StepTimeout:
    """The exception for a step that stood still."""
    return StepTimeout(
        f"the step made no progress for {timeout:g} seconds; {_state(dead, training)}\n"
        f"{result.waiting}".rstrip()
    )


def _state(dead: bool, training: bool) -> str:
    parts = [NO_GRADIENTS] if training else []
    if dead:
        parts.append("the pipeline is dead, for a stage's code has not returned: make a new one")
    else:
        parts.append("the next step starts afresh")
    return "; ".join(parts)
