"""Pipeline: the object users hold."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _C
from .assemble import assemble
from .base import arguments
from .checkpoint.unsplit import UnsplitModel
from .engines.devices import DevicesLike
from .engines.lifetime import Lifetime
from .errors import InvalidArgument, PipelineError
from .plan.build import ScheduleLike
from .plan.costs import Costs
from .plan.ordering import PackLike
from .plan.pack_choice import PackChoice
from .plan.profile import Profile
from .plan.schedule_choice import ScheduleChoice
from .plan.simulation import Simulation, simulate
from .processes.group import MeshLike
from .reduction import GradientReduction
from .report.trace import Trace
from .settings import Settings, WireLike
from .stages import microbatch
from .step.batch import Batch
from .step.graphs import GraphReport


class Pipeline(UnsplitModel):
    """A model cut into stages that trains on microbatches, with the gradients of plain autograd.

    Example::

        pipe = Pipeline(model, num_stages=2, microbatches=8, schedule="1f1b", loss_fn=loss_fn)
        for x, y in batches:
            optimizer.zero_grad()
            loss = pipe.step(x, target=y)
            optimizer.step()

    Model and cut:
        model: an ``nn.Sequential``; a module whose children run in order, with ``cuts``; or a list of stage
            modules, each of which takes the result of the one before as its one argument. The list may hold
            functions without arguments that make the modules: each process of a ``mesh`` then calls those of
            its own stages alone, and parameters tied between processes are not recognised. To tie parameters
            across processes give modules, on the meta device if they are large.
        num_stages: into how many stages to cut. Optional if ``model`` or ``cuts`` say it.
        cuts, balance, sample: where to cut; see ``pipeline_ext.partition.cut``.

    Schedule:
        microbatches: M, into how many parts ``step`` cuts a batch along dimension 0.
        schedule: a name from ``schedule_names()``; the path of a CSV file in the action text of
            torch.distributed.pipelining; or each rank's actions as text, by rank. ``"auto"`` measures the first
            three steps. When the fourth begins it simulates and searches for two seconds, follows the best
            order, and prints it. It considers orders that keep stages on their ranks and hold no more
            microbatches than ``in_flight`` allows, or without it than a rank holds in the first steps.
        overlap: run a rank's forward and backward tasks at the same time: on the CPU on a thread each, on a GPU
            on streams of their own. A module may then run forward twice at once if it is recomputed. None: on
            GPUs, and not on the CPU.
        reactive: let a rank whose next planned task is not ready run another that is. The microbatches of
            one stage and kind keep their order, and the limit of microbatches in flight holds, so the
            gradients are the same. False: exactly the planned order; a ``schedule`` that lists the order is
            refused if ``pack`` or ``in_flight`` would change it. Always False if ``mesh`` has dimensions beside
            "pp" and "dp": their processes must communicate in one order (tensor parallelism).
        in_flight: the most microbatches that a stage may hold at once, or a list of that by stage. None: as
            many as the schedule takes. A schedule that would never end within it is refused.
        costs: the costs for which ``"zb-auto"`` is searched, within their ``memory_limit`` or else
            ``in_flight``. None: F = I = W = 1 at each stage. Every schedule keeps the ``memory_limit``: an order
            that exceeds it is refused, and reactive ranks begin an ``F`` only if it fits.

    Devices and processes:
        devices: one entry for each rank, CPUs or CUDA devices; several ranks may share one. None: as many ranks
            as stages, or half as many for a schedule that holds several stages on a rank, spread over all GPUs
            that torch sees; without GPUs, on the CPU. Stages are moved to their devices, in place. With ``mesh``
            this process's one device alone, as in ``["cuda:0"]``; None: the GPU of torchrun's LOCAL_RANK if mesh
            is of "cuda" or a group with NCCL, otherwise the CPU.
        mesh: the processes that share the pipeline, one for each rank. All make it, with the same arguments.
            A ``DeviceMesh``: stages lie along its dimension "pp"; gradients are averaged over its dimension
            "dp", if there is one; other dimensions are left to the stages. Or a process group. Rank 0 resolves
            every ``"auto"`` for all processes. None: this process has all ranks.
        reduction: gives each of several replicas of the pipeline the mean of their gradients. None: one is made
            for the replicas of ``mesh``, if it has any.
        graphs: on one GPU, capture a whole step in a CUDA graph once two like it have run, and launch that.
            Steps that cannot be captured run without a graph, and the reason is printed. The parameters'
            ``.grad`` are then the graph's own memory, which the next step overwrites.

    Messages:
        pack: K, how many microbatches' gradients leave a stage for the one before in one message: a number,
            ``"all"``, ``"auto"``, or a dict from boundaries to numbers (boundary b is between stages b and
            b + 1; one left out has 1). The stages upstream then hold as many more microbatches as the
            simulated step needs. ``"auto"`` measures the first three steps; when the fourth begins it simulates
            K = 1, 2, 4, ..., follows the best, and prints it. Results between stages on one rank are handed
            over one by one.
        pack_forward: the same for activations.
        pack_skips: a dict from names of skip connections (see ``pipeline_ext.skips``) to K, a number or
            ``"all"``, for the tensors that go from stage to stage and for their gradients; one left out has 1.
        wire: floating-point type in which gradients travel, or a dict from boundaries to types. None: their
            own. They are cast back on arrival.
        wire_forward: the same for activations, in ``eval`` too. A skip connection that begins at stage s
            travels as activations do at boundary s; the gradient of one that ends there travels as gradients
            do at boundary s - 1.

    Numbers:
        loss_fn: called as ``loss_fn(output, target)``, or ``loss_fn(output)`` for a step without target;
            returns a tensor without dimensions. If it is a module, its parameters are trained too.
        loss_reduction: ``"mean"`` scales a microbatch's loss by its share of the batch's rows, ``"sum"``
            does not.
        optimizer: its ``step`` is called at the end of each step, and is part of the graph if there is one; for
            that it must be torch's SGD, or made with ``capturable=True``.
        scaler: scales each loss before its backward. The losses that ``step`` returns are unscaled. After
            ``step`` call ``scaler.step(optimizer)`` and ``scaler.update()`` as usual. In several processes give a
            ``ShardedGradScaler`` over those that hold the stages, so that all of them skip a step together.

    Safety:
        timeout: seconds without a task's begin or end after which a step is given up; on GPUs, seconds that
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
        cuts: Sequence[str | int] | None = None,
        balance: str = "parameters",
        sample: Any = None,
        loss_reduction: str = "mean",
        overlap: bool | None = None,
        reactive: bool = True,
        pack: PackLike = 1,
        pack_forward: PackLike = 1,
        pack_skips: Mapping[str, int | str] | None = None,
        wire: WireLike = None,
        wire_forward: WireLike = None,
        in_flight: int | Sequence[int] | None = None,
        costs: Costs | None = None,
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
            cuts=cuts,
            balance=balance,
            sample=sample,
            loss_reduction=loss_reduction,
            overlap=overlap,
            reactive=reactive,
            pack=pack,
            pack_forward=pack_forward,
            pack_skips=pack_skips,
            wire=wire,
            wire_forward=wire_forward,
            in_flight=in_flight,
            costs=costs,
            timeout=timeout,
            reduction=reduction,
            graphs=graphs,
            optimizer=optimizer,
            scaler=scaler,
            mesh=mesh,
        )
        parts = assemble(settings)
        self.microbatches = settings.microbatches
        self.tracing = bool(trace)
        self._has_loss = loss_fn is not None
        self._num_stages = parts.num_stages
        self._stages = parts.stages
        self._devices = parts.devices
        self._sharing = parts.sharing
        self._first_steps = parts.first_steps
        self._engine = parts.engine
        self._routes = parts.routes
        self._stepper = parts.stepper
        self._graphs = parts.graphs
        # What UnsplitModel needs.
        self._local = parts.local
        self._group = parts.sharing.group
        self._lifetime = Lifetime(self, parts.engine)

    # -- training and evaluation

    def step(
        self,
        *args: Any,
        target: Any = None,
        losses: list[Tensor] | None = None,
        return_outputs: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Any]:
        """Runs one batch forward and backward; adds the gradients to the parameters' ``.grad``.

        Args:
            args, kwargs: inputs of the first stage. Every tensor of one dimension or more is cut along
                dimension 0; all have the same number of rows, at least ``microbatches``. What is no
                tensor goes to every microbatch.
            target: any pytree of tensors with one row for each of the batch's, for ``loss_fn``.
            losses: filled with each microbatch's loss, as ``loss_fn`` returned it.
            return_outputs: also return the last stage's output for the whole batch.

        Returns:
            The total loss, a tensor without dimensions and without gradient; with ``return_outputs`` a
            pair of it and the output.

        Raises:
            InvalidArgument: for inputs that cannot be used; nothing has run.
            StageError: a stage's code raised; the exception is its ``__cause__``.
            StepTimeout: no progress for ``timeout`` seconds.
            ReductionError: another replica failed, or does not match this one.
            DeviceError: a GPU or its driver failed.
            DeadPipeline: the pipeline is closed, a stage's code never returned, or a GPU has failed.

            After StageError, StepTimeout, DeviceError, ReductionError or KeyboardInterrupt every ``.grad`` of
            the model is None; buffers and random state may have advanced. The next ``step`` works, unless a
            stage's code has never returned, a GPU has failed, or there is a ``reduction``: its group has ended.
        """
        self._lifetime.check()
        arguments.check_trains(self._has_loss, losses, target)
        size = None
        if self._has_first_stage:
            size = microbatch.batch_size(args, kwargs)
            arguments.check_rows(size, self.microbatches)
        with self._lifetime.one_at_a_time("step was called"):
            self._first_steps.prepare(self._routes.follow)
            args, kwargs = self._engine.arrive((args, kwargs), 0)
            batch = Batch(
                args,
                kwargs,
                target=self._engine.arrive(target, self.num_stages - 1) if self._stages[-1].is_last else None,
                rows=size,
                keep_outputs=return_outputs,
                keep_losses=losses is not None,
                record=self.tracing,
            )
            if self._graphs is None:
                outcome = self._stepper.train(batch)
            else:
                outcome = self._graphs.step(batch, self._stepper)
        if losses is not None:
            losses[:] = [loss for loss in outcome.losses if loss is not None]
        return (outcome.loss, outcome.outputs) if return_outputs else outcome.loss

    def eval(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one batch forward without gradients and returns the last stage's output.

        Takes inputs as ``step`` does; a batch smaller than ``microbatches`` is cut into single rows.
        Whether modules are in training or evaluation mode is left as it is. Raises as ``step`` does, but
        leaves every ``.grad`` alone.
        """
        self._lifetime.check()
        size = microbatch.batch_size(args, kwargs) if self._has_first_stage else None
        if size == 0:
            raise InvalidArgument("the batch has no rows")
        with self._lifetime.one_at_a_time("eval was called"):
            return self._stepper.evaluate(args, kwargs, size)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within it steps add up gradients without reducing them; the first step after it reduces the sums.

        All replicas do so for as many steps. Like ``no_sync`` of DistributedDataParallel.
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
        """The plan of a step. ``pack="auto"`` and ``schedule="auto"`` take another one as the fourth begins."""
        return self._routes.train.plan

    @property
    def pack_choice(self) -> PackChoice | None:
        """What ``pack="auto"`` has chosen; None until it has."""
        choice = self._first_steps.choice
        return choice if isinstance(choice, PackChoice) else None

    @property
    def schedule_choice(self) -> ScheduleChoice | None:
        """What ``schedule="auto"`` has chosen; None until it has."""
        choice = self._first_steps.choice
        return choice if isinstance(choice, ScheduleChoice) else None

    @property
    def devices(self) -> list[torch.device]:
        """The device of each rank."""
        return list(self._devices)

    @property
    def graph(self) -> GraphReport | None:
        """What has become of ``graphs=True``; None without."""
        return None if self._graphs is None else self._graphs.report

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return self._num_stages

    @property
    def unsplit_stages(self) -> dict[int, str]:
        """Stages whose last I ran the backward whole, with the reason; W only adds what that has put by."""
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

        All call it together; where there is one process it is ``trace``. Raises as that does; PeerError where a
        process is gone, or does not come within ``timeout``; DeadPipeline.
        """
        return self._sharing.gather(self.trace, self._lifetime)

    def profile(self) -> Profile:
        """Seconds of F, B, or I and W, and messages of one microbatch, measured in the last ``step``."""
        return self.trace.profile()

    def simulate(self, costs: Costs | None = None) -> Simulation:
        """Simulates this pipeline's plan.

        With no ``costs``, those of ``profile()``, in seconds; before the first step
        ``Costs()``: F = 1 and B = 2 at every stage.
        """
        if costs is None:
            costs = Costs() if self._stepper.trace is None else self.profile().costs(self.plan)
        return simulate(self.plan, costs)

    def __repr__(self) -> str:
        return f"<Pipeline: {self.plan!r}>"

    # -- lifetime

    def close(self) -> None:
        """Ends the pipeline's threads, or lets go of its streams.

        Also done by ``with``, by garbage collection and at exit.
        """
        self._lifetime.close()

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
