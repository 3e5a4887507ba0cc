"""Runs one step on the engine, and cleans up if it fails."""

import contextlib
from collections.abc import Sequence
from typing import Any

from ..engines.protocol import Engine, Route, StepResult
from ..stages.stage import Stage
from ..stages.step import Step
from .failure import NO_GRADIENTS, reason, step_error


def run_step(
    engine: Engine[Any],
    route: Route,
    stages: list[Stage],
    step: Step,
    *,
    timeout: float,
    record: bool = False,
    within: contextlib.AbstractContextManager | None = None,
) -> StepResult:
    """Runs the tasks of ``route`` inside ``within``: a training step if the plan has a backward.

    Tells other processes of a failure, then raises as ``Pipeline.step`` does.
    """
    training = route.plan.has_backward
    try:
        route.exchange.begin(step)
        for stage in stages:
            stage.begin(step)
        step.random.start()
        with within or contextlib.nullcontext():
            result = engine.run(route, timeout=timeout, record=record)
    except BaseException as interrupt:
        _stopped(engine, stages, training, interrupt)
        raise
    finally:
        step.random.leave()
        awaited = route.exchange.awaited()
        route.exchange.end()
        for stage in stages:
            stage.end()
    if result.outcome != "done":
        try:
            raise _failed(engine, route, stages, result, timeout, awaited)
        finally:
            del result  # breaks a cycle: it holds the error, whose traceback holds this frame
    return result


def wait_for_inputs(engine: Engine[Any], route: Route, stages: list[Stage], timeout: float) -> None:
    """Waits until the caller may change the inputs of the step that ran last. Fails as ``run_step`` does."""
    try:
        failure = engine.wait_for_inputs(timeout)
    except BaseException as interrupt:
        _stopped(engine, stages, route.plan.has_backward, interrupt)
        raise
    if failure is not None:
        raise _failed(engine, route, stages, failure, timeout)


def settle(engine: Engine[Any], route: Route, stages: list[Stage], timeout: float) -> None:
    """Waits until other processes have what the last step has sent them. Fails as ``run_step`` does."""
    try:
        engine.settle(route, timeout)
    except BaseException as interrupt:
        _stopped(engine, stages, route.plan.has_backward, interrupt)
        raise


def _stopped(engine: Engine[Any], stages: list[Stage], training: bool, interrupt: BaseException) -> None:
    engine.failed(f"{type(interrupt).__name__}: {interrupt}")
    give_up(engine, stages, training)
    if training:
        interrupt.add_note(f"the step was stopped; {NO_GRADIENTS}")


def _failed(
    engine: Engine[Any],
    route: Route,
    stages: list[Stage],
    result: StepResult,
    timeout: float,
    awaited: Sequence[str] = (),
) -> BaseException:
    training = route.plan.has_backward
    give_up(engine, stages, training)
    if result.outcome != "closed":
        engine.failed(reason(route.plan, result, timeout, awaited))
    return step_error(route.plan, result, engine, timeout, training, awaited)


def give_up(engine: Engine[Any], stages: list[Stage], training: bool = True) -> None:
    """Cleans up after a failed step: what it left behind cannot touch the model, and gradients are None."""
    engine.give_up(stages)
    if training:
        for stage in stages:
            for parameter in stage.parameters():
                parameter.grad = None
