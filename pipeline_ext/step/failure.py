"""A step's failure, as the exception the user sees."""

from collections.abc import Sequence
from typing import Any

from .. import _C
from ..engines.protocol import Engine, StepResult
from ..errors import DeadPipeline, DeviceError, PeerError, StageError, StepTimeout

NO_GRADIENTS = "every .grad of the model is None; buffers and random state may have advanced"

_KINDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}


def step_error(
    plan: _C.Plan,
    result: StepResult,
    engine: Engine[Any],
    timeout: float,
    training: bool,
    awaited: Sequence[str],
) -> BaseException:
    """The exception for a step that did not finish.

    ``awaited``: messages from other processes that had not arrived.
    """
    state = _state(engine, training)
    if result.outcome == "failed":
        return _failure(plan, result, state, awaited)
    if result.outcome == "closed":
        gradients = f"; {NO_GRADIENTS}" if training else ""
        return DeadPipeline(f"the pipeline was closed while a step ran{gradients}")
    messages = "".join(f"  waits for {message}\n" for message in awaited)
    return StepTimeout(
        f"the step made no progress for {timeout:g} seconds; {state}\n{messages}{result.waiting}".rstrip()
    )


def reason(plan: _C.Plan, result: StepResult, timeout: float, awaited: Sequence[str]) -> str:
    """Why a step did not finish, in one line for other processes."""
    if result.outcome == "timed out":
        waits = f", waiting for {', and '.join(awaited)}" if awaited else ""
        return f"it made no progress for {timeout:g} seconds{waits}"
    error = result.error
    where = "" if result.failed_task is None else f"{plan.action(result.failed_task)} raised "
    return f"{where}{type(error).__name__}: {error}".partition("\n")[0]


def _failure(plan: _C.Plan, result: StepResult, state: str, awaited: Sequence[str]) -> BaseException:
    """The exception if a stage's code raised, which is then its cause, or a device or process failed."""
    error = result.error
    if isinstance(error, DeviceError) and result.failed_task is None:
        return DeviceError(f"{error}; {state}")
    if isinstance(error, PeerError):
        waits = f"; this process waited for {', and '.join(awaited)}" if awaited else ""
        peer_error = PeerError(f"{error}{waits}; {state}")
        peer_error.__cause__ = error.__cause__
        return peer_error
    assert error is not None and result.failed_task is not None  # a task failed
    action = plan.action(result.failed_task)
    kind, stage, m, rank, _ = plan.describe(result.failed_task)
    where = f"{action}, the {_KINDS[kind]} of microbatch {m} at stage {stage} on rank {rank}"
    if isinstance(error, DeviceError):
        device_error = DeviceError(f"{error}; it happened at {where}; {state}")
        device_error.__cause__ = error.__cause__
        return device_error
    if not isinstance(error, Exception):  # KeyboardInterrupt and the like keep their type
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


def _state(engine: Engine[Any], training: bool) -> str:
    parts = [NO_GRADIENTS] if training else []
    if engine.dead:
        parts.append(f"the pipeline is dead: {engine.death}; make a new one")
    else:
        parts.append("the next step starts afresh")
    return "; ".join(parts)
