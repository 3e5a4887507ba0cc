"""Pipeline: the object users hold."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _C
from .assemble import Assembly, assemble
from .base import arguments, torch_release
from .base.no_module import NoModule, instead
from .calls.model_loss import check_sums
from .calls.program import Program
from .checkpoint.unsplit import LocalModel, UnsplitModel, repeated_names
from .engines.devices import DevicesLike
from .engines.lifetime import Lifetime, NoEngine
from .errors import InvalidArgument, PeerError, PipelineError
from .microbatches.counting import LossWeight
from .microbatches.cutting import Presplit, Whole
from .microbatches.rows import unmarked
from .partition import by_calls, given_sample, takes_by_name
from .plan.build import ScheduleLike
from .plan.costs import Costs
from .plan.measured_slots import SlotChoice
from .plan.microbatch_order import MicrobatchOrder
from .plan.ordering import PackLike
from .plan.pack_choice import PackChoice
from .plan.profile import Profile
from .plan.schedule_choice import ScheduleChoice
from .plan.simulation import Simulation, simulate
from .processes.group import MeshLike
from .reduction import GradientReduction
from .report.trace import Trace
from .report.verification import Verification
from .settings import Settings, WireLike
from .stages.modes import evaluation_mode
from .step.batch import Batch
from .step.entry_order import EntryOrder, check_reorders
from .step.graphs import GraphReport
from .step.loss import step_loss
from .step.verify import verify

torch_release.check(torch.__version__)

# Attributes that there are once the model is cut.
_PARTS = {
    f"_{name}"
    for name in "has_loss num_stages stages containers program devices sharing first_steps engine routes "
    "stepper graphs unsplit".split()
}


class Pipeline(UnsplitModel, NoModule):
    """A model cut into stages that trains on microbatches, with the gradients of plain autograd.

    Example::

        pipe = Pipeline(model, num_stages=2, microbatches=8, schedule="1f1b", loss_fn=loss_fn)
        for x, y in batches:
            optimizer.zero_grad()
            loss = pipe.step(x, target=y)
            optimizer.step()

    Model and cut:
        model: any module. An ``nn.Sequential`` that does nothing but run its layers is cut between layers;
            each stage of another runs the model's own forward and computes its share of the calls of layers.
            Or a list of stage modules, each of which takes the result of the previous one as its one argument.
            The list may hold functions without arguments that make the modules. Each process of a ``mesh``
            then calls only those of its own stages, and parameters tied between processes are not recognised.
            To tie parameters across processes, give modules, on the meta device if they are large.
        num_stages: the number of stages. Optional if ``model`` or ``cuts`` say it.
        cuts, balance, sample: where to cut; see ``pipeline_ext.partition.cut``. A model that is cut by its own
            forward needs a ``sample``, a batch of the kind that ``step`` gets; without one, and without
            ``mesh``, the first batch serves.

    Microbatches:
        microbatches: M, the number of parts into which ``step`` cuts a batch.
        batch_dim: the dimension of inputs, targets and outputs that holds the batch's rows, as 1 for models
            that are sequence-first. None is 0, with a warning if a layer has ``batch_first=False``.
        args_spec, kwargs_spec, target_spec: how positional arguments (a tuple), keyword arguments (a dict) and
            the target are cut: ``pipeline_ext.rows(dim=...)``, ``pipeline_ext.whole()``, or torch's
            ``TensorChunkSpec`` and ``_Replicate``, in any tuple, list or dict that follows the value. ``None``
            leaves a value to the rules of ``step``.

    Schedule:
        schedule: a name from ``schedule_names()``; the path of a CSV file in the action text of
            torch.distributed.pipelining; or each rank's actions as text, by rank. ``"auto"`` measures the first
            three steps. When the fourth begins it simulates and searches for two seconds, follows the best
            order, and prints it. It considers orders that keep stages on their ranks and hold no more
            microbatches than ``in_flight`` allows. Without ``in_flight``, a rank may hold as many as in the
            first steps. On CPUs, if the median of 20 steps is more than 10 % off what it promised, it says so,
            measures three steps and chooses anew.
        overlap: run a rank's forward and backward tasks at the same time: on the CPU in two threads, on a GPU
            on separate streams. A recomputed module may then run two forwards at once. None: True on GPUs,
            False on the CPU.
        reactive: let a rank whose next planned task is not ready run another task that is. The microbatches
            of one stage and kind keep their order, and the limit of microbatches in flight holds, so the
            gradients are the same. False: follow the planned order exactly. A ``schedule`` that lists its order
            is then refused if ``pack`` or ``in_flight`` would change it. If ``mesh`` has dimensions other than
            "pp" and "dp" (tensor parallelism), one of the processes that hold the same stages decides the order
            for all of them; with ``overlap`` or on GPUs it is then the planned one.
        in_flight: the most microbatches that a stage may hold at once: a number, or a list by stage. None: as
            many as the schedule takes. A schedule that could never finish within the limit is refused.
            ``"auto"``: as many as shorten a step whose times vary by 30 %, simulated, within the
            ``memory_limit`` of ``costs``; ``pipeline-ext plan --noise 0.3`` shows what each number brings. If
            ``costs`` have no ``act_memory``, the limit is bytes of activations by rank: the first step runs as
            the schedule takes it and measures them, and the second begins with a choice, which is printed.
            InvalidSchedule if what the schedule takes by itself exceeds the limit.
        costs: the costs for which ``"zb-auto"`` searches an order, within their ``memory_limit`` or else
            ``in_flight``. None: ``F`` = ``I`` = ``W`` = 1 at each stage. The ``memory_limit`` applies to every
            schedule: an order that exceeds it is refused, and reactive ranks begin an ``F`` only if it fits.

    Devices and processes:
        devices: one CPU or CUDA device for each rank; several ranks may share one. None: as many ranks as
            stages, or half as many for a schedule that holds several stages on a rank. They are spread over
            all GPUs that torch sees, or run on the CPU if there are none. Stages are moved to their devices in
            place. With ``mesh``, give only this process's device, as in ``["cuda:0"]``. None is then the GPU of
            torchrun's LOCAL_RANK if ``mesh`` is of "cuda" or a group with NCCL, otherwise the CPU.
        non_blocking: as in ``Tensor.to``: on GPUs, ``step`` and ``eval`` return before a batch in the host's
            memory has been read. Leave it alone until then, as until a ``torch.cuda.Event`` recorded after
            ``step`` has happened. False: they wait for the copies once all is enqueued, so the batch may be
            refilled.
        mesh: the processes that share the pipeline, one for each rank. All of them make the pipeline, with the
            same arguments. Give a process group, or a ``DeviceMesh``: stages lie along its dimension "pp";
            gradients are averaged over its dimension "dp", if there is one; other dimensions are left to the
            stages. Rank 0 resolves every ``"auto"`` for all processes. None: this process has all ranks.
        reduction: averages gradients over several replicas of the pipeline. None: one is made for the replicas
            of ``mesh``, if it has any.
        graphs: on one GPU, capture a whole step in a CUDA graph after two like it have run, and replay it for
            later ones. A step that cannot be captured runs without a graph, and the reason is printed. With a
            graph, the parameters' ``.grad`` are the graph's own memory, which the next step overwrites.

    Messages:
        pack: K, the number of microbatches whose gradients a stage sends in one message to the stage before: a
            number, ``"all"``, ``"auto"``, or a dict from boundaries to numbers. Boundary b is between stages b
            and b + 1; a boundary that the dict leaves out has K = 1. The stages upstream hold as many more
            microbatches as the simulated step needs. ``"auto"`` measures the first three steps. When the fourth
            begins it simulates K = 1, 2, 4, ..., follows the best, and prints it. Results between stages on one
            rank are handed over one by one.
        pack_forward: the same for activations.
        pack_skips: a dict from names of skip connections (see ``pipeline_ext.skips``) to K, a number or
            ``"all"``. It holds for the tensors sent from stage to stage and for their gradients. A skip that
            the dict leaves out has K = 1.
        wire: the floating-point type in which gradients are sent, or a dict from boundaries to types. None:
            their own type. They are cast back on arrival.
        wire_forward: the same for activations, in ``eval`` too. A skip connection that begins at stage s is
            sent in the type of activations at boundary s. The gradient of one that ends at stage s is sent in
            the type of gradients at boundary s - 1.

    Numbers:
        loss_fn: called as ``loss_fn(output, target)``, or ``loss_fn(output)`` for a step without target;
            returns a tensor without dimensions. None: for a model cut by its own forward, the output's
            ``loss``, or the output itself if it is a scalar; others do not train. If it is a module, its
            parameters are trained too.
        stage_loss: called as ``stage_loss(module)`` with each stage's module after each of its forwards;
            returns a scalar that adds to the total loss, weighted like the microbatch's own. For penalties on
            weights, and for losses that layers keep in attributes. ``loss_fn`` is refused if it reaches for
            those of other stages. A weight that is tied between stages is in the modules of each.
        loss_reduction: ``"mean"`` scales a microbatch's loss by its share of the batch's rows, ``"sum"``
            does not.
        loss_weight: called with a microbatch's target, or with its keyword input ``labels`` if the model
            computes the loss and there is no target; returns what the mean in its loss is over, as
            ``pipeline_ext.count_not(-100)`` for masked labels. The total is then the mean over all that count,
            sum(w * loss) / sum(w), over all replicas too; a microbatch with w = 0 is left out. With replicas,
            a step's loss is this replica's part of the total, times their number, so that the mean of theirs
            is the total. What ``stage_loss`` and ``WithLoss`` add is weighted by rows. ``"rows"``: weigh by
            rows; so does None, but refuses a target of which microbatches have different numbers of labels of
            -100, and a mean that autograd's graph shows to be over other numbers than rows.
        optimizer: its ``step`` is called at the end of each step, and is part of the graph if there is one. A
            graph needs torch's SGD, or an optimizer made with ``capturable=True``.
        scaler: scales each loss before its backward. The losses that ``step`` returns are unscaled. After
            ``step`` call ``scaler.step(optimizer)`` and ``scaler.update()`` as usual. Several processes need a
            ``ShardedGradScaler`` over the processes that hold the stages, so that all skip a step together.

    Safety:
        nonfinite: what becomes of a step with a loss or a gradient that is infinite or not a number.
            ``"raise"``: NonFiniteError names the stage and the microbatch with which that began, and every
            ``.grad`` is None. ``"skip"``: a warning names them, the step returns, and every ``.grad`` is None,
            so that optimizers leave the step out; ``skipped`` counts such steps. All processes and replicas do
            the same; under ``no_sync``, in the step that reduces. ``"warn"``: a warning alone. Each of these
            reads once what stages send on and back, and the gradients; on GPUs ``step`` waits for its end. A
            ``scaler`` looks at the gradients itself. None: warn once of a loss, where no GPU has to be waited
            for.
        timeout: a step fails after this many seconds in which no task begins or ends. On GPUs, the seconds that
            ``step`` waits for the step before the last.
        trace: record when each task of a step runs; set ``tracing`` to change it for later steps.

    Raises:
        InvalidArgument: for anything above that cannot be used (InvalidSchedule for ``schedule``).
        DeviceError: if the CUDA driver, or a device asked for, cannot be used.

    Attributes:
        tracing: whether the next step is recorded.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        num_stages: int | None = None,
        microbatches: int | None = None,
        schedule: ScheduleLike = "1f1b",
        loss_fn: Callable[..., Tensor] | None = None,
        *,
        devices: DevicesLike = None,
        non_blocking: bool = False,
        cuts: Sequence[str | int] | None = None,
        balance: str | None = None,
        sample: Any = None,
        batch_dim: int | None = None,
        args_spec: Any = None,
        kwargs_spec: Any = None,
        target_spec: Any = None,
        loss_reduction: str = "mean",
        loss_weight: LossWeight | str | None = None,
        stage_loss: Callable[[nn.Module], Tensor] | None = None,
        overlap: bool | None = None,
        reactive: bool = True,
        pack: PackLike = 1,
        pack_forward: PackLike = 1,
        pack_skips: Mapping[str, int | str] | None = None,
        wire: WireLike = None,
        wire_forward: WireLike = None,
        in_flight: int | Sequence[int] | Literal["auto"] | None = None,
        costs: Costs | None = None,
        nonfinite: str | None = None,
        timeout: float = 1800.0,
        trace: bool = True,
        reduction: GradientReduction | None = None,
        graphs: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        mesh: MeshLike = None,
    ) -> None:
        settings = Settings(
            model=model,
            num_stages=num_stages,
            microbatches=microbatches,  # type: ignore[arg-type]  # Settings refuses None
            schedule=schedule,
            loss_fn=loss_fn,
            devices=devices,
            non_blocking=non_blocking,
            cuts=cuts,
            balance=balance,
            sample=sample,
            batch_dim=batch_dim,
            args_spec=args_spec,
            kwargs_spec=kwargs_spec,
            target_spec=target_spec,
            loss_reduction=loss_reduction,
            loss_weight=loss_weight,
            stage_loss=stage_loss,
            overlap=overlap,
            reactive=reactive,
            pack=pack,
            pack_forward=pack_forward,
            pack_skips=pack_skips,
            wire=wire,
            wire_forward=wire_forward,
            in_flight=in_flight,
            costs=costs,
            nonfinite=nonfinite,
            timeout=timeout,
            reduction=reduction,
            graphs=graphs,
            optimizer=optimizer,
            scaler=scaler,
            mesh=mesh,
        )
        self.microbatches = settings.microbatches
        self.tracing = bool(trace)
        self._entry_order = EntryOrder()
        self._settings: Settings | None = None  # until the first batch, if that is the sample
        if by_calls(model) and sample is None:
            self._wait_for_a_sample(settings)
        else:
            self._take(assemble(settings))

    def _wait_for_a_sample(self, settings: Settings) -> None:
        """The first batch will show the calls of the model."""
        arguments.check_waits(settings.mesh, settings.num_stages, settings.cuts)
        self._settings = settings
        model, loss_fn = settings.model, settings.loss_fn
        assert isinstance(model, nn.Module)
        self._local = LocalModel(model, [model], {0: model}, repeated_names(model, loss_fn), loss_fn)
        self._group = None
        self._lifetime = Lifetime(self, NoEngine())

    def _cut_with(self, args: tuple, kwargs: dict[str, Any], arg_mbs: Any, kwarg_mbs: Any) -> tuple[Any, Any]:
        """Cuts the model by the calls that it makes with this batch, if that was not done before.

        Returns the microbatches, as lists if they were iterators.
        """
        if self._settings is not None:
            self._lifetime.check()
            if isinstance(arg_mbs, Iterator):
                arg_mbs = list(arg_mbs)
            if isinstance(kwarg_mbs, Iterator):
                kwarg_mbs = list(kwarg_mbs)
            if args or kwargs or arg_mbs or kwarg_mbs:
                self._take(
                    assemble(self._settings, given_sample(self._settings, args, kwargs, arg_mbs, kwarg_mbs))
                )
                self._settings = None
        return arg_mbs, kwarg_mbs

    def _spread(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """A mapping, as a tokenizer's, in place of all keyword inputs."""
        if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
            program: Program | None = self.__dict__.get("_program")
            waits = self._settings is not None and not isinstance(args[0], dict)
            if (waits and takes_by_name(self._local.module, args[0])) or (
                program is not None and program.takes_keywords
            ):
                return (), dict(args[0])
        return args, kwargs

    def _take(self, parts: Assembly) -> None:
        self._has_loss = parts.has_loss
        self._num_stages = parts.num_stages
        self._stages = parts.stages
        self._containers = parts.containers
        self._program: Program | None = parts.program
        self._devices = parts.devices
        self._sharing = parts.sharing
        self._first_steps = parts.first_steps
        self._engine = parts.engine
        self._routes = parts.routes
        self._stepper = parts.stepper
        self._graphs = parts.graphs
        self._unsplit = parts.unsplit
        # UnsplitModel reads these.
        self._local = parts.local
        self._group = parts.sharing.group
        self._circle = parts.sharing.circle
        trained = parts.local.trained
        self._lifetime = Lifetime(self, parts.engine, [*trained.parameters(), *trained.buffers()])

    def __getattr__(self, name: str) -> Any:
        if self.__dict__.get("_settings") is not None and name in _PARTS:
            raise PipelineError(
                "the model is cut in the first step, by the calls that it makes with the first batch; give a "
                "batch as sample= to Pipeline to cut it at once"
            )
        raise instead(name)

    # -- training and evaluation

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = False,
        arg_mbs: Iterable[Any] | None = None,
        kwarg_mbs: Iterable[dict[str, Any]] | None = None,
        target_mbs: Iterable[Any] | None = None,
        microbatch_work: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Any]:
        """Runs one batch forward and backward; adds the gradients to the parameters' ``.grad``.

        Args:
            args, kwargs: inputs of the first stage, any pytrees. A model that is cut by its own forward takes a
                mapping in place of its keyword inputs. A tensor of one dimension or more has a row
                for each sample along ``batch_dim``, and is cut there; all have the same number of rows, at
                least ``microbatches``. So have nested tensors and FlexAttention's BlockMask. What is different
                is said with ``pipeline_ext.rows`` and ``pipeline_ext.whole``, or specs. Tensors without
                dimensions, and values without tensors, go to every microbatch.
            target: any pytree of tensors for ``loss_fn``, cut in the same way.
            losses: a list that is filled with each microbatch's loss, as ``loss_fn`` returned it.
            return_outputs: also return the last stage's output for the whole batch, without its graph. Outputs
                that cannot be joined, as of ragged sequences, come as a list with one for each microbatch.
            arg_mbs, kwarg_mbs, target_mbs: in place of ``args``, ``kwargs``, ``target``: M microbatches, of any
                shapes, as lists or other iterables of tuples, dicts and targets.
            microbatch_work: how much work each of M unequal microbatches is, in any unit, as its tokens. They
                then enter in the order with which the simulated step is shortest (``microbatch_order``), and
                gradients are summed in that order; ``entry_order`` tells it. Losses and outputs are as given.
                Errors, traces and random numbers go by the place in that order. Not in many processes.

        Returns:
            The total loss, a tensor without dimensions and without gradient; with ``return_outputs``, the
            pair of the loss and the output.

        Raises:
            InvalidArgument: for inputs that cannot be used; nothing has run.
            StageError: a stage's code raised; the exception is its ``__cause__``.
            NonFiniteError: see ``nonfinite``.
            StepTimeout: no progress for ``timeout`` seconds.
            ReductionError: another replica failed, or does not match this one.
            DeviceError: a GPU or its driver failed.
            DeadPipeline: the pipeline is closed, a stage's code never returned, or a GPU has failed.

            After StageError, StepTimeout, DeviceError, ReductionError or KeyboardInterrupt every ``.grad`` of
            the model is None; buffers and random state may have advanced. The next ``step`` works, unless a
            stage's code has never returned, a GPU has failed, or there is a ``reduction``: its group has ended.
        """
        args, kwargs = self._spread(args, kwargs)
        arg_mbs, kwarg_mbs = self._cut_with(args, kwargs, arg_mbs, kwarg_mbs)
        self._stepper.check()
        self._check_usable()
        arguments.check_trains(self._has_loss, losses, target)
        inputs = self._inputs(args, kwargs, arg_mbs, kwarg_mbs, fewest=self.microbatches)
        self._check_sample(inputs)
        target = self._target(target, target_mbs, inputs)
        if microbatch_work is not None:
            check_reorders(self._group is not None, self._graphs is not None)
        with self._lifetime.turn("step was called"):
            self._stepper.begun = False
            # Processes choose a plan together, and that tells them of each other's errors.
            self._first_steps.prepare(self._routes.follow)
            try:
                order = self._entry_order.find(self._routes.train.plan, microbatch_work)
                last = self._stages[-1]
                batch = Batch(
                    None if inputs is None else self._engine.arrive(inputs, 0),
                    target=self._engine.arrive(target, self.num_stages - 1) if last.is_last else None,
                    keep_outputs=return_outputs,
                    keep_losses=losses is not None,
                    record=self.tracing,
                    labels=self._labels(inputs, kwargs) if target is None else None,
                    order=order,
                )
                if self._graphs is None:
                    outcome = self._stepper.train(batch)
                else:
                    outcome = self._graphs.step(batch, self._stepper)
                self._stepper.release_inputs()
                if losses is not None:
                    losses[:] = [loss for loss in outcome.losses if loss is not None]
                loss = step_loss(outcome.loss)
            except BaseException as error:
                self._stepper.abandon(error)
                raise
        return (loss, outcome.outputs) if return_outputs else loss

    def eval(
        self,
        *args: Any,
        arg_mbs: Iterable[Any] | None = None,
        kwarg_mbs: Iterable[dict[str, Any]] | None = None,
        keep_mode: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Runs one batch forward without gradients and returns the last stage's output.

        Takes inputs as ``step`` does, and returns outputs as it does; a batch smaller than ``microbatches`` is
        cut into single rows, and ``arg_mbs`` and ``kwarg_mbs`` may hold fewer microbatches. Modules run in
        evaluation mode, and are in their own mode again afterwards; with ``keep_mode`` they run in their own.
        Raises as ``step`` does, but leaves every ``.grad`` alone.
        """
        args, kwargs = self._spread(args, kwargs)
        arg_mbs, kwarg_mbs = self._cut_with(args, kwargs, arg_mbs, kwarg_mbs)
        self._check_usable()
        inputs = self._inputs(args, kwargs, arg_mbs, kwarg_mbs, fewest=1)
        if inputs is not None and self._stepper.cutter.rows(inputs) == 0:
            raise InvalidArgument("the batch has no rows")
        modules = [stage.module for stage in self._stages] if self._program is None else [self._program.model]
        with self._lifetime.turn("eval was called"), evaluation_mode([] if keep_mode else modules):
            return self._stepper.evaluate(inputs)

    def verify(
        self,
        *args: Any,
        target: Any = None,
        arg_mbs: Iterable[Any] | None = None,
        kwarg_mbs: Iterable[dict[str, Any]] | None = None,
        target_mbs: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> Verification:
        """Runs one step, and the unsplit model in plain autograd, and compares their losses and gradients.

        Takes a batch as ``step`` does. Compares with the same microbatches, where everything should be equal
        bit for bit (tied weights: within rounding), and with the whole batch at once, where a difference has a
        reason: batch norm, labels that do not count, an input that is cut and should not be. ``print`` the
        result: a table, and what the differences are due to. The model, its gradients, optimizer and random
        state stay as they are. Needs all stages in this process, on one GPU or on the CPU, without replicas,
        and room for the whole model. With ``graphs=True`` the step runs without its graph. Raises as ``step``
        does.
        """
        args, kwargs = self._spread(args, kwargs)
        arg_mbs, kwarg_mbs = self._cut_with(args, kwargs, arg_mbs, kwarg_mbs)
        self._check_usable()
        arguments.check_trains(self._has_loss, None, target)
        if self._unsplit is None:
            raise InvalidArgument(
                "verify runs the unsplit model too, so it needs all stages in this process, and no replicas; "
                "make a Pipeline without mesh and reduction for it"
            )
        first, ranks, count = self._devices[0], len(self._devices), len({*self._devices})
        if count > 1:
            raise InvalidArgument(
                f"verify runs the unsplit model too, on one device, and the stages are on {count}; make a "
                f'Pipeline with devices=["{first}"] * {ranks} for it'
            )
        inputs = self._inputs(args, kwargs, arg_mbs, kwarg_mbs, fewest=self.microbatches)
        assert inputs is not None  # the first stage is here
        self._check_sample(inputs)
        target = self._target(target, target_mbs, inputs)
        with self._lifetime.turn("verify was called"):
            self._first_steps.prepare(self._routes.follow)
            inputs = self._engine.arrive(inputs, 0)
            target = self._engine.arrive(target, self.num_stages - 1)
            labels = self._labels(inputs, kwargs) if target is None else None
            named = dict(self.named_parameters())
            replays = self._graphs is not None and self._graphs.report.fallback is None
            return verify(self._unsplit, self._stepper, inputs, target, named, labels, replays)

    def _check_usable(self) -> None:
        """Raises DeadPipeline; InvalidArgument if the model has changed so that its stages do not follow."""
        self._lifetime.check()
        self._containers.check()
        if self._program is not None:
            self._program.check()

    def _check_sample(self, inputs: Whole | Presplit | None) -> None:
        """Raises InvalidArgument for a training batch of another kind than the sample."""
        if self._program is not None and inputs is not None:
            batches = inputs.parts if isinstance(inputs, Presplit) else [unmarked((inputs.args, inputs.kwargs))]
            for batch in batches:
                self._program.check_like_sample(batch)
                check_sums(batch[1], self._stepper.weighted)

    def _labels(self, inputs: Whole | Presplit | None, kwargs: dict[str, Any]) -> Any:
        """The labels from which the model computes its loss; None if there are none, or it does not."""
        if self._program is None or not self._stages[-1].is_last:
            return None
        if isinstance(inputs, Presplit):
            of_each = [of_microbatch.get("labels") for _, of_microbatch in inputs.parts]
            return None if any(labels is None for labels in of_each) else Presplit(of_each)
        return kwargs.get("labels")

    def _target(self, target: Any, target_mbs: Iterable[Any] | None, inputs: Whole | Presplit | None) -> Any:
        """The target of a call with these inputs. Raises InvalidArgument for too few rows."""
        if isinstance(inputs, Whole):
            arguments.check_rows(self._stepper.cutter.rows(inputs), self.microbatches)
        return self._stepper.cutter.given_target(target, target_mbs, self.microbatches)

    def _inputs(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        arg_mbs: Iterable[Any] | None,
        kwarg_mbs: Iterable[dict[str, Any]] | None,
        *,
        fewest: int,
    ) -> Whole | Presplit | None:
        """The inputs of a call; None if another process has the first stage."""
        if not self._has_first_stage:
            return None
        if not args and not kwargs and arg_mbs is None and kwarg_mbs is None:
            raise InvalidArgument(
                "no inputs are given; step and eval run one batch, as in pipe.eval(x). To switch modules "
                "between training and evaluation mode, call train() or eval() of the model"
            )
        counts = range(fewest, self.microbatches + 1)
        return self._stepper.cutter.given_inputs(args, kwargs, arg_mbs, kwarg_mbs, counts)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside it, steps add up gradients without reducing them; the first step after it reduces the sums.

        All replicas run the same number of steps inside it. Like ``no_sync`` of DistributedDataParallel.
        """
        before, self._stepper.syncs = self._stepper.syncs, False
        try:
            yield
        finally:
            self._stepper.syncs = before

    @property
    def _has_first_stage(self) -> bool:
        return self._stages[0].index == 0

    # -- what was planned and what happened

    @property
    def plan(self) -> _C.Plan:
        """The plan of a step. ``pack="auto"`` and ``schedule="auto"`` replace it as the fourth step begins.

        ``schedule="auto"`` may do so again: see ``schedule``. ``in_flight="auto"`` that measures memory
        replaces it as the second step begins.
        """
        return self._routes.train.plan

    @property
    def entry_order(self) -> MicrobatchOrder | None:
        """The order in which the microbatches of the last step entered; None: as they were given."""
        return self._entry_order.found

    @property
    def pack_choice(self) -> PackChoice | None:
        """The choice of ``pack="auto"``; None before it is made."""
        choice = self._first_steps.choice
        return choice if isinstance(choice, PackChoice) else None

    @property
    def schedule_choice(self) -> ScheduleChoice | None:
        """The choice of ``schedule="auto"``; None before it is made, and while it is made anew."""
        choice = self._first_steps.choice
        return choice if isinstance(choice, ScheduleChoice) else None

    @property
    def slot_choice(self) -> SlotChoice | None:
        """What ``in_flight="auto"`` chose from the memory that the first step measured; None before."""
        choice = self._first_steps.choice
        return choice if isinstance(choice, SlotChoice) else None

    @property
    def devices(self) -> list[torch.device]:
        """The device of each rank."""
        return list(self._devices)

    @property
    def graph(self) -> GraphReport | None:
        """What ``graphs=True`` has done so far; None without it."""
        return None if self._graphs is None else self._graphs.report

    @property
    def skipped(self) -> int:
        """Steps so far that ``nonfinite="skip"`` has left out."""
        return self._stepper.nonfinite.skipped

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return self._num_stages

    @property
    def unsplit_stages(self) -> dict[int, str]:
        """Stages whose last ``I`` ran the full backward, with the reason; ``W`` only adds stored gradients."""
        return {stage.index: stage.unsplit for stage in self._stages if stage.unsplit}

    @property
    def stage_modules(self) -> list[nn.Module]:
        """The module of each stage. Its layers are the model's own."""
        return [stage.module for stage in self._stages]

    @property
    def trace(self) -> Trace:
        """Records of the last ``step``. Raises PipelineError before the first, or with trace=False."""
        if self._stepper.trace is None:
            raise PipelineError(
                "there is no trace: run a step first"
                if self.tracing
                else "there is no trace: this pipeline was made with trace=False; set tracing=True"
            )
        return self._stepper.trace

    def gather_trace(self) -> Trace | None:
        """``trace`` with the tasks of all the pipeline's processes, in rank 0's clock; None on the other ranks.

        All processes call it together. With one process it returns ``trace``. Raises as ``trace`` does;
        PeerError if a process is gone, or does not come within ``timeout``; DeadPipeline.
        """
        try:
            return self._sharing.gather(self.trace, self._lifetime)
        except PeerError as error:
            self._engine.failed(str(error))
            raise

    def profile(self) -> Profile:
        """Seconds and messages of one microbatch's ``F``, ``B``, or ``I`` and ``W``, from the last ``step``."""
        return self.trace.profile()

    def simulate(self, costs: Costs | None = None) -> Simulation:
        """Simulates this pipeline's plan.

        ``costs`` None: those of ``profile()``, in seconds. Before the first step: ``Costs()``, which is
        ``F`` = 1 and ``B`` = 2 at every stage.
        """
        if costs is None:
            costs = Costs() if self._stepper.trace is None else self.profile().costs(self.plan)
        return simulate(self.plan, costs)

    def __repr__(self) -> str:
        return f"<Pipeline: {self.plan!r}>"

    # -- lifetime

    def close(self) -> None:
        """Ends the pipeline's threads, or releases its streams.

        Also called by ``with``, by garbage collection and at exit.
        """
        self._lifetime.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
