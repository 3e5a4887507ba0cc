"""From a batch to gradients: everything around the engine's run of a step."""

import contextlib
import functools
from dataclasses import dataclass, field
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


@dataclass(kw_only=True, eq=False)
class Stepper:
    """Runs one batch at a time, for training or evaluation.

    Attributes:
        weighted: scale each microbatch's loss by its share of the batch's rows.
        timeout: seconds without progress after which a step is given up.
        trace: the trace of the last training step, if it was recorded.
        syncs: whether training steps reduce gradients, if there are replicas.
    """

    stages: list[Stage]
    engine: Engine[Any]
    routes: Routes
    shared: SharedParameters
    wrapped: WrappedStages
    ties: Ties
    first_steps: FirstSteps
    reduction: GradientReduction | None
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler | None
    microbatches: int
    weighted: bool
    timeout: float
    trace: Trace | None = field(default=None, init=False)
    syncs: bool = field(default=True, init=False)
    _context: CallerContext = field(default_factory=CallerContext.of_this_thread, init=False)

    @property
    def _has_loss(self) -> bool:
        return self.stages[-1].is_last

    def train(self, batch: Batch) -> Outcome:
        """Runs a training step. Raises as ``Pipeline.step`` does."""
        size, count, target = batch.rows, self.microbatches, batch.target
        target_rows = microbatch.rows_of(target) if size is None else size
        step = Step(
            exchange=self.routes.train.exchange,
            microbatches=count,
            rows=size,
            context=self.caller_context(),
            inputs=self._split_inputs((batch.args, batch.kwargs), size, count),
            targets=self._split_targets(target, target_rows),
            target_rows=target_rows,
            weighted=self.weighted,
            scaler=self.scaler,
            keep_outputs=batch.keep_outputs,
        )
        self.ties.begin()
        self.shared.begin()
        with self._replicas(), self.wrapped.step(self.syncs):
            result = self._run(self.routes.train, step, record=batch.record)
            if not step.has_trained and self._has_loss:
                raise PipelineError(
                    "step found nothing to train: no microbatch's loss depends on anything that requires a "
                    "gradient; are all parameters frozen, or is the loss detached?"
                )
            try:
                self.shared.end()
                step.backward_into_inputs()
                if self.reduction is not None:
                    reduced = self.reduction.finish(self.timeout)
                    if self.trace is not None:
                        self.trace.add_reductions(reduced)
                self.ties.end(functools.partial(self.engine.add_up, timeout=self.timeout))
                loss = step.known_loss()
                assert loss is not None  # the last stage is here, or its process has sent it
                keep = batch.keep_outputs and self._has_loss
                outputs = microbatch.merge(step.outputs) if keep else None
            except BaseException as error:
                self.engine.failed(f"{type(error).__name__}: {error}")
                self.give_up()
                error.add_note(NO_GRADIENTS)
                raise
        if self.optimizer is not None:
            self.optimizer.step()
        return Outcome(loss, step.losses if self._has_loss else [], outputs, result)

    def evaluate(self, args: tuple, kwargs: dict[str, Any], rows: int | None) -> Any:
        """The last stage's output for the whole batch; None if another process has that stage.

        ``rows``: None if another process has the first stage. Raises as ``Pipeline.eval`` does.
        """
        count = self.engine.agreed_count(None if rows is None else min(rows, self.microbatches))
        route = self.routes.eval(count)
        inputs = (args, kwargs) if rows is None else self.engine.arrive((args, kwargs), 0)
        step = Step(
            exchange=route.exchange,
            microbatches=count,
            rows=rows,
            context=self.caller_context(),
            inputs=self._split_inputs(inputs, rows, count),
        )
        self._run(route, step)
        return microbatch.merge(step.outputs) if self._has_loss else None

    def _split_targets(self, target: Any, rows: int | None) -> list[Any] | None:
        if target is None:
            return None
        return microbatch.split(target, rows, self.microbatches, "target")

    def _split_inputs(self, inputs: Any, rows: int | None, count: int) -> list[Any] | None:
        return None if rows is None else microbatch.split(inputs, rows, count, "an input")

    def keep_trace(self, result: StepResult, record: bool) -> None:
        """Sets ``trace`` to that of the step with this result; None unless ``record``."""
        self.trace = self._trace_of(result) if record else None

    def give_up(self) -> None:
        """Cleans up after a failed training step; see ``run.give_up``."""
        give_up(self.engine, self.stages)

    def caller_context(self) -> CallerContext:
        """The calling thread's context; the same object until something in it changes."""
        context = CallerContext.of_this_thread()
        if context != self._context:
            self._context = context
        return self._context

    def _replicas(self) -> contextlib.AbstractContextManager[None]:
        """The context in which a step runs if there are replicas."""
        if self.reduction is None:
            return contextlib.nullcontext()
        return self.reduction.step(self.timeout, self.syncs)

    def _trace_of(self, result: StepResult) -> Trace:
        route = self.routes.train
        return Trace(route.plan, result, route.exchange.messages(), self.first_steps.choice)

    def _run(self, route: Route, step: Step, record: bool = False) -> StepResult:
        training = route.plan.has_backward
        measures = training and self.first_steps.measures
        result = run_step(
            self.engine,
            route,
            self.stages,
            step,
            timeout=self.timeout,
            record=record or measures,
            within=self.wrapped.gathered(),
        )
        if training:
            self.keep_trace(result, record)
        if measures:
            self.first_steps.observe(self.trace or self._trace_of(result))
        return result
