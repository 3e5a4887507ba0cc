"""From a batch to gradients: everything around the engine's run of a step."""

import contextlib
import functools
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from ..engines.protocol import Engine, Route, StepResult
from ..errors import DeadPipeline, InvalidArgument, PipelineError
from ..microbatches.counting import LossWeight, check_unmasked, counts
from ..microbatches.cutting import Cut, Cutter, Presplit, Whole
from ..microbatches.joining import join
from ..plan.first_steps import FirstSteps
from ..reduction.replica_reduction import ReplicaReduction
from ..report.trace import Trace
from ..stages.activation_memory import ActivationMemory
from ..stages.context import CallerContext
from ..stages.loss_means import check_over_rows
from ..stages.loss_view import LossView
from ..stages.parameter_hooks import ParameterHooks
from ..stages.random_streams import RandomStreams
from ..stages.reach import Owners
from ..stages.shared_parameters import SharedParameters
from ..stages.stage import Stage
from ..stages.step import Step
from ..stages.ties import Ties
from ..stages.wrapped import WrappedStages
from .batch import Batch, Outcome
from .entry_order import as_given, entering
from .failure import NO_GRADIENTS
from .nonfinite import NonFinite
from .routes import Routes
from .run import give_up, run_step, wait_for_inputs


@dataclass(kw_only=True, eq=False)
class Stepper:
    """Runs one batch at a time, for training or evaluation.

    Attributes:
        cutter: cuts batches into microbatches.
        weighted: scale each microbatch's loss by its share of the batch's rows.
        loss_weight: what a microbatch's own loss is scaled by instead, before the weights are made to sum to 1.
        timeout: seconds without progress after which a step is given up.
        trace: the trace of the last training step, if it was recorded.
        syncs: whether training steps reduce gradients, if there are replicas.
        begun: whether a training step has begun, so that there may be gradients of a part of it.
    """

    stages: list[Stage]
    engine: Engine[Any]
    routes: Routes
    shared: SharedParameters
    owners: Owners
    loss_view: LossView | None
    hooks: ParameterHooks
    random: RandomStreams
    wrapped: WrappedStages
    ties: Ties
    first_steps: FirstSteps
    cutter: Cutter
    reduction: ReplicaReduction[Any] | None
    optimizer: torch.optim.Optimizer | None
    scaler: torch.amp.GradScaler | None
    microbatches: int
    weighted: bool
    loss_weight: LossWeight | str | None
    timeout: float
    nonfinite: NonFinite
    trace: Trace | None = field(default=None, init=False)
    syncs: bool = field(default=True, init=False)
    begun: bool = field(default=False, init=False)
    _warned: bool = field(default=False, init=False)
    _context: CallerContext = field(default_factory=CallerContext.of_this_thread, init=False)

    @property
    def _has_loss(self) -> bool:
        return self.stages[-1].is_last

    def train(self, batch: Batch, applies: bool = True) -> Outcome:
        """Runs a training step. Raises as ``Pipeline.step`` does.

        Unless it ``applies`` the gradients, no optimizer and no hook gets them, and they are not scaled.
        """
        self.begun = False
        count, target = self.microbatches, batch.target
        cut = None if batch.inputs is None else self.cutter.cut_inputs(batch.inputs, count)
        rows = None if cut is None else sum(cut.lengths)
        if cut is not None and batch.order is not None:
            cut = Cut(entering(cut.parts, batch.order), entering(cut.lengths, batch.order))
        step = Step(
            exchange=self.routes.train.exchange,
            microbatches=count,
            rows=None if cut is None else cut.lengths,
            context=self.caller_context(),
            inputs=None if cut is None else cut.parts,
            targets=self._cut_target(target, rows, batch),
            target_rows=self.cutter.target_rows(target) if rows is None else rows,
            weighted=self.weighted,
            scaler=self.scaler if applies else None,
            keep_outputs=batch.keep_outputs,
            random=self.random.begin(),
            watch=self.nonfinite.watch(count) if applies else None,
            looks_at_means=applies and self.weighted and self.loss_weight is None and not _is_presplit(batch),
        )
        if applies:
            self.nonfinite.check(step)
        counted = self._counted(step.targets or self._cut_target(batch.labels, rows, batch))
        try:
            return self._train(step, counted, batch, applies)
        except BaseException as error:
            self.abandon(error)
            raise
        finally:
            self.hooks.put_back()

    def _train(self, step: Step, counted: list[float], batch: Batch, applies: bool) -> Outcome:
        self.owners.refresh()
        self.shared.begin()
        if self.loss_view is not None:
            self.loss_view.begin()
        if applies:
            self.hooks.hold()
        with self._replicas(), self.wrapped.step(self.syncs):
            self.begun = True
            self.ties.begin()
            if counted:
                step.loss_weights = self._loss_weights(counted)
            result = self._run(self.routes.train, step, record=batch.record)
            if not step.has_trained and self._has_loss and any(step.loss_weights or [1]):
                self.begun = False  # there are no gradients
                raise PipelineError(
                    "step found nothing to train: no microbatch's loss depends on anything that requires a "
                    "gradient; are all parameters frozen, or is the loss detached?"
                )
            if step.means is not None and self._has_loss:
                shares = [step.weight(m) for m in range(self.microbatches)]
                check_over_rows(step.means, shares, synchronizes=not self._warned)
            self.shared.end()
            if self.loss_view is not None:
                self.loss_view.end()
            step.backward_into_inputs()
            if self.reduction is not None:
                reduced = self.reduction.finish(self.timeout)
                if self.trace is not None:
                    self.trace.add_reductions(reduced)
            self.ties.end(functools.partial(self.engine.add_up, timeout=self.timeout))
            loss = step.known_loss()
            assert loss is not None  # the last stage is here, or its process has sent it
            found = self.nonfinite.find(step, loss, self.syncs, self.timeout) if applies else None
            drops = self.nonfinite.drops(found)
            keep = batch.keep_outputs and self._has_loss
            outputs = join(as_given(step.outputs, batch.order), self.cutter.batch_dim) if keep else None
        if not self._warned and any(step.loss_weights or [1]):
            self._warn_of_idle()
        self.random.end(step.random, trains=True)
        if drops:
            self.give_up()
        self.nonfinite.act(found)
        if applies and not drops:
            self.hooks.put_back()
            self.hooks.run()
            if self.optimizer is not None:
                self.optimizer.step()
        return Outcome(loss, as_given(step.losses, batch.order) if self._has_loss else [], outputs, result)

    def _cut_target(self, target: Any, rows: int | None, batch: Batch) -> list[Any] | None:
        found = self.cutter.cut_target(target, rows, self.microbatches)
        return None if found is None else entering(found, batch.order)

    def abandon(self, error: BaseException) -> None:
        """After ``error`` at any moment of a call of a training step: leaves no gradients of a part of it.

        Other processes and replicas, which may have the whole step, are told. Before the step has begun an
        ``Exception`` is a refusal: nothing has run, and other processes wait for the next call.
        """
        has_begun = self.begun or (self.reduction is not None and self.reduction.in_step)
        if not has_begun and isinstance(error, Exception):
            return
        if NO_GRADIENTS in " ".join([str(error), *getattr(error, "__notes__", [])]):
            return  # whoever says so has done it
        self.begun = False
        self.hooks.put_back()
        self.engine.failed(f"{type(error).__name__}: {error}")
        if not has_begun and not self.engine.dead:
            return  # no other process is in this step
        if self.reduction is not None:
            self.reduction.abandon(error)
        self.give_up()
        error.add_note(NO_GRADIENTS)

    def check(self) -> None:
        """Raises DeadPipeline, with no gradients left, if what the last step returned is useless."""
        error = self.engine.interruption
        if error is not None:
            self.give_up()
            raise DeadPipeline(
                f"this pipeline is dead: {self.engine.death}: {error}; what its last step returned is useless, "
                f"and {NO_GRADIENTS}; make a new one"
            )

    def evaluate(self, inputs: Whole | Presplit | None) -> Any:
        """The last stage's output for the whole batch; None if another process has that stage.

        ``inputs``: None if another process has the first stage. Raises as ``Pipeline.eval`` does.
        """
        count = self.engine.agreed_count(None if inputs is None else self._count_of(inputs))
        route = self.routes.eval(count)
        cut = None if inputs is None else self.cutter.cut_inputs(self.engine.arrive(inputs, 0), count)
        step = Step(
            exchange=route.exchange,
            microbatches=count,
            rows=None if cut is None else cut.lengths,
            context=self.caller_context(),
            inputs=None if cut is None else cut.parts,
            random=self.random.begin(),
        )
        self._run(route, step)
        self.random.end(step.random, trains=False)
        wait_for_inputs(self.engine, route, self.stages, self.timeout)
        return join(step.outputs, self.cutter.batch_dim) if self._has_loss else None

    def release_inputs(self) -> None:
        """Waits until the caller may change the batch of a training step. Raises as ``Pipeline.step`` does."""
        wait_for_inputs(self.engine, self.routes.train, self.stages, self.timeout)

    def _warn_of_idle(self) -> None:
        """Warns in the first step of parameters that no gradient has reached."""
        self._warned = True
        names = [] if self.wrapped else self.owners.without_gradient(stage.index for stage in self.stages)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warnings.warn(
                f"no gradient reached {', '.join(names[:3])}{more} in the first step; if the model uses these "
                "parameters, a part of it does not run in its stages (pipe.verify compares with the model "
                "itself)",
                stacklevel=4,
            )

    def weights_of(self, rows: list[int], targets: list[Any] | None) -> list[tuple[float, float]]:
        """By microbatch: the weight of its own loss, and of what stages add, in a step without replicas."""
        by_rows = [n / sum(rows) if self.weighted else 1.0 for n in rows]
        counted = self._counted(targets)
        return list(zip(self._loss_weights(counted) if counted else by_rows, by_rows, strict=True))

    def _counted(self, targets: list[Any] | None) -> list[float]:
        """What each microbatch counts; empty without ``loss_weight``, or where the last stage is elsewhere."""
        if not self._has_loss:
            return []
        if self.loss_weight is None or isinstance(self.loss_weight, str):
            if targets is not None and self.weighted and self.loss_weight is None:
                check_unmasked(targets, synchronizes=not self._warned)
            return []
        if targets is None:
            raise InvalidArgument(
                "loss_weight counts in the target, or in the keyword input labels if the model computes its "
                "loss, and step was given neither; give target= or labels="
            )
        return counts(self.loss_weight, targets)

    def _loss_weights(self, counted: list[float]) -> list[float]:
        """The weight of each microbatch's loss in the mean over all that count, in all replicas."""
        total = sum(counted)
        if self.reduction is not None:
            total = self.reduction.mean(total, self.timeout)
        if total == 0:
            raise InvalidArgument(
                "loss_weight returned 0 for every microbatch, so there is nothing to train on; leave such a "
                "batch out"
            )
        return [count / total for count in counted]

    def _count_of(self, inputs: Whole | Presplit) -> int:
        """The microbatches of an evaluation: a batch smaller than ``microbatches`` is cut into single rows."""
        if isinstance(inputs, Presplit):
            return len(inputs.parts)
        return min(self.cutter.rows(inputs), self.microbatches)

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
        with contextlib.ExitStack() as around:
            if measures and self.first_steps.weighs:
                step.memory = ActivationMemory(route.plan.num_stages)
                around.enter_context(step.memory.of_step())
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
            trace = self.trace or self._trace_of(result)
            trace.act_memory = None if step.memory is None else step.memory.by_stage
            self.first_steps.observe(trace)
        elif training and self.first_steps.watches:
            self.first_steps.took((result.end - result.begin) * 1e-9)
        return result


def _is_presplit(batch: Batch) -> bool:
    """Whether the caller cut the batch, as far as this process knows: microbatches may be of any lengths."""
    known = [part for part in (batch.inputs, batch.target) if part is not None]
    return not known or any(isinstance(part, Presplit) for part in known)
