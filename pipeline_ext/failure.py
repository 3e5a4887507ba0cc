"""A step's failure, as the exception the user sees."""

from . import _C
from .engine import Engine, StepResult
from .errors import DeadPipeline, DeviceError, StageError, StepTimeout

NO_GRADIENTS = (
    "every .grad of the model is None; buffers and random state may have advanced"
)

_KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def step_error(
    plan: _C.Plan, result: StepResult, engine: Engine, timeout: float, training: bool
) -> BaseException:
    """The exception for a step that did not come to its end."""
    state = _state(engine, training)
    if result.outcome == "failed":
        return _failure(plan, result, state)
    if result.outcome == "closed":
        gradients = f"; {NO_GRADIENTS}" if training else ""
        return DeadPipeline(f"the pipeline was closed while a step ran{gradients}")
    return StepTimeout(
        f"the step made no progress for {timeout:g} seconds; {state}\n{result.waiting}".rstrip()
    )


def _failure(plan: _C.Plan, result: StepResult, state: str) -> BaseException:
    """A stage's code has raised, or a device has failed; chained to the original exception."""
    error = result.error
    if isinstance(error, DeviceError) and result.failed_task is None:
        return DeviceError(f"{error}; {state}")
    action = plan.action(result.failed_task)
    kind, stage, m, rank, _ = plan.describe(result.failed_task)
    where = f"{action}, the {_KINDS[kind]} of microbatch {m} at stage {stage} on rank {rank}"
    if isinstance(error, DeviceError):
        return DeviceError(f"{error}; it happened at {where}; {state}")
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


def _state(engine: Engine, training: bool) -> str:
    parts = [NO_GRADIENTS] if training else []
    if engine.dead:
        parts.append(f"the pipeline is dead, for {engine.death}: make a new one")
    else:
        parts.append("the next step starts afresh")
    return "; ".join(parts)
