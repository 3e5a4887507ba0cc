"""Runs one step on the engine, and cleans up if it fails."""

import contextlib
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
    route.exchange.begin(step)
    for stage in stages:
        stage.begin(step)
    try:
        with within or contextlib.nullcontext(), step.random.in_this_thread():
            result = engine.run(route, timeout=timeout, record=record)
    except BaseException as interrupt:
        engine.failed(f"{type(interrupt).__name__}: {interrupt}")
        give_up(engine, stages, training)
        if training:
            interrupt.add_note(f"the step was stopped; {NO_GRADIENTS}")
        raise
    finally:
        awaited = route.exchange.awaited()
        route.exchange.end()
        for stage in stages:
            stage.end()
    if result.outcome != "done":
        give_up(engine, stages, training)
        if result.outcome != "closed":
            engine.failed(reason(route.plan, result, timeout, awaited))
        try:
            raise step_error(route.plan, result, engine, timeout, training, awaited)
        finally:
            del result  # breaks a cycle: it holds the error, whose traceback holds this frame
    return result


def give_up(engine: Engine[Any], stages: list[Stage], training: bool = True) -> None:
    """Cleans up after a failed step: what it left behind cannot touch the model, and gradients are None."""
    engine.give_up(stages)
    if training:
        for stage in stages:
            for parameter in stage.parameters():
                parameter.grad = None
