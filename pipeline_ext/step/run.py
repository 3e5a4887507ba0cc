"""The engine's run of one step, and what is done where it does not come to its end."""

import contextlib

from ..engines.protocol import Engine, Route, StepResult
from ..stages.stage import Stage
from ..stages.step import Step
from .failure import NO_GRADIENTS, reason, step_error


def run_step(
    engine: Engine,
    route: Route,
    stages: list[Stage],
    step: Step,
    *,
    timeout: float,
    record: bool = False,
    within: contextlib.AbstractContextManager | None = None,
) -> StepResult:
    """Runs the tasks of ``route``, in ``within``; a training step where these have a backward.

    Raises as ``Pipeline.step`` does, having told other processes.
    """
    training = route.plan.has_backward
    route.exchange.begin(step)
    for stage in stages:
        stage.begin(step)
    try:
        with within or contextlib.nullcontext():
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
            del result  # it leads to the error, and the error, by its traceback, here
    return result


def give_up(engine: Engine, stages: list[Stage], training: bool = True) -> None:
    """After a step that failed: what it has left behind cannot be used."""
    engine.give_up(stages)
    if training:
        for stage in stages:
            for parameter in stage.parameters():
                parameter.grad = None
