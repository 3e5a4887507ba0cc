"""From a batch to gradients: what surrounds the engine's run of a step."""

import contextlib
import functools
from typing import Any

import torch

from ..engines.protocol import Engine, Route, StepResult
from ..errors import PipelineError
from ..plan.first_steps import FirstSteps
from ..reduction import GradientReduction
from ..report.trace import Trace
from ..stages import microbatch
from ..stages.context import CallerContext
from ..stages.shared_parameters import SharedParameters
from ..stages.stage import Stage
from ..stages.step import Step
from ..stages.ties import Ties
from ..stages.wrapped import WrappedStages
from .batch import Batch, Outcome
from .failure import NO_GRADIENTS
from .routes import Routes
from .run import give_up, run_step


class Stepper:
    """Runs one batch at a time, for training or evaluation.

    Attributes:
        trace: of the last training step, where it was recorded.
        syncs: whether gradients of training steps are reduced, where there are replicas.
    """

    def __init__(
        self,
        stages: list[Stage],
        engine: Engine,
        routes: Routes,
        shared: SharedParameters,
        first_steps: FirstSteps,
        reduction: GradientReduction | None,
        wrapped: WrappedStages,
        optimizer: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None,
        ties: Ties | None,
        *,
        microbatches: int,
        weighted: bool,
        timeout: float,
    ) -> None:
        """``weighted``: by its share of the rows is how a microbatch's loss enters the total."""
        self.trace: Trace | None = None
        self.syncs = True
        self._stages = stages
        self._has_loss = stages[-1].is_last
        self._engine = engine
        self._routes = routes
        self._shared = shared
        self._first_steps = first_steps
        self._reduction = reduction
        self._wrapped = wrapped
        self._optimizer = optimizer
        self._scaler = scaler
        self._ties = ties
        self._microbatches = microbatches
        self._weighted = weighted
        self._timeout = timeout
        self._context = CallerContext.of_this_thread()

    def train(self, batch: Batch) -> Outcome:
        """Raises as ``Pipeline.step`` does."""
        size, count, target = batch.rows, self._microbatches, batch.target
        target_rows = microbatch.rows_of(target) if size is None else size
        step = Step(
            exchange=self._routes.train.exchange,
            microbatches=count,
            rows=size,
            context=self.caller_context(),
            inputs=self._split_inputs((batch.args, batch.kwargs), size, count),
            targets=None if target is None else microbatch.split(target, target_rows, count, "target"),
            target_rows=target_rows,
            weighted=self._weighted,
            scaler=self._scaler,
            keep_outputs=batch.keep_outputs,
        )
        if self._ties is not None:
            self._ties.begin()
        self._shared.begin()
        with self._replicas(), self._wrapped.step(self.syncs):
            result = self._run(self._routes.train, step, record=batch.record)
            if not step.has_trained and self._has_loss:
                raise PipelineError(
                    "step found nothing to train: no microbatch's loss depends on anything that requires a "
                    "gradient; are all parameters frozen, or is the loss detached?"
                )
            try:
                self._shared.end()
                step.backward_into_inputs()
                if self._reduction is not None:
                    reduced = self._reduction.finish(self._timeout)
                    if self.trace is not None:
                        self.trace.add_reductions(reduced)
                if self._ties is not None:
                    self._ties.end(functools.partial(self._engine.add_up, timeout=self._timeout))
                loss = step.known_loss()
                keep = batch.keep_outputs and self._has_loss
                outputs = microbatch.merge(step.outputs) if keep else None
            except BaseException as error:
                self._engine.failed(f"{type(error).__name__}: {error}")
                self.give_up()
                error.add_note(NO_GRADIENTS)
                raise
        if self._optimizer is not None:
            self._optimizer.step()
        return Outcome(loss, step.losses if self._has_loss else [], outputs, result)

    def evaluate(self, args: tuple, kwargs: dict[str, Any], rows: int | None) -> Any:
        """The last stage's output for the whole batch; None where another process has that stage.

        ``rows``: None where another process has the first stage. Raises as ``Pipeline.eval`` does.
        """
        count = self._engine.agreed(None if rows is None else min(rows, self._microbatches))
        route = self._routes.eval(count)
        inputs = (args, kwargs) if rows is None else self._engine.arrive((args, kwargs), 0)
        step = Step(
            exchange=route.exchange,
            microbatches=count,
            rows=rows,
            context=self.caller_context(),
            inputs=self._split_inputs(inputs, rows, count),
        )
        self._run(route, step)
        return microbatch.merge(step.outputs) if self._has_loss else None

    def _split_inputs(self, inputs: Any, rows: int | None, count: int) -> list[Any] | None:
        return None if rows is None else microbatch.split(inputs, rows, count, "an input")

    def keep_trace(self, result: StepResult, record: bool) -> None:
        """Makes ``trace`` that of the step with this result."""
        self.trace = self._trace_of(result) if record else None

    def give_up(self) -> None:
        """After a training step that failed: what it has left behind cannot be used."""
        give_up(self._engine, self._stages)

    def caller_context(self) -> CallerContext:
        """Of the calling thread; the same object while nothing in it has changed."""
        context = CallerContext.of_this_thread()
        if context != self._context:
            self._context = context
        return self._context

    def _replicas(self) -> contextlib.AbstractContextManager[None]:
        """What a step has around it where there are replicas."""
        if self._reduction is None:
            return contextlib.nullcontext()
        return self._reduction.step(self._timeout, self.syncs)

    def _trace_of(self, result: StepResult) -> Trace:
        route = self._routes.train
        return Trace(route.plan, result, route.exchange.messages(), self._first_steps.choice)

    def _run(self, route: Route, step: Step, record: bool = False) -> StepResult:
        training = route.plan.has_backward
        measures = training and self._first_steps.measures
        result = run_step(
            self._engine,
            route,
            self._stages,
            step,
            timeout=self._timeout,
            record=record or measures,
            within=self._wrapped.gathered(),
        )
        if training:
            self.keep_trace(result, record)
        if measures:
            self._first_steps.observe(self.trace or self._trace_of(result))
        return result
