"""Pipeline: the object the user holds."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import _C
from .base import arguments
from .checkpoint.unsplit import LocalModel, UnsplitModel, repeated_names
from .engines import devices as device_choice
from .engines.choice import described_device, make_engine
from .engines.lifetime import Lifetime
from .errors import InvalidArgument, PipelineError
from .model.cut import cut
from .model.skips import declared_skips, find_skips
from .plan.build import AUTO, ScheduleLike, check_trainable
from .plan.costs import Costs
from .plan.ordering import Ordering, PackLike
from .plan.pack_choice import PackChoice
from .plan.profile import Profile
from .plan.schedule_choice import ScheduleChoice
from .plan.simulation import Simulation, simulate
from .processes.agreement import check_agreement, skips_of_all
from .processes.group import MeshLike, Processes
from .reduction import GradientReduction, ProcessGroupMember
from .report.trace import Trace
from .stages import microbatch
from .stages.local import initialise, local_stages
from .stages.shared_parameters import SharedParameters
from .stages.stage import Stage
from .stages.ties import Ties
from .stages.wrapped import WrappedStages
from .step.agreed_choice import OneChooses
from .step.batch import Batch
from .step.gathered_trace import TraceGathering
from .step.graphs import GraphReport, StepGraphs
from .step.routes import Routes
from .step.stepper import Stepper
from .transport.exchange import Exchange
from .transport.link import FREE_LINK, LocalLink

WireLike = torch.dtype | None | Mapping[int, torch.dtype | None]


class Pipeline(UnsplitModel):
    """A model cut into stages that trains on microbatches, with the gradients of plain autograd.

    Example::

        pipe = Pipeline(model, num_stages=2, microbatches=8, schedule="1f1b", loss_fn=loss_fn)
        for x, y in batches:
            optimizer.zero_grad()
            loss = pipe.step(x, target=y)
            optimizer.step()

    Args:
        model: an ``nn.Sequential``; a list of stage modules, each of which takes what the one before
            returns as its one argument, or of functions without arguments that make them; or a module whose
            children run in order, with ``cuts``. Each process of a ``mesh`` calls the functions of its own
            stages alone; what they share with stages of other processes is not known to be tied. For that
            give modules, on the meta device if they are large.
        num_stages: into how many stages to cut; may be left out where ``model`` or ``cuts`` say it.
        microbatches: M, into how many parts ``step`` cuts a batch along dimension 0.
        schedule: a name (``schedule_names()`` lists them), the path of a CSV file in the action text of
            torch.distributed.pipelining, or each rank's actions as text, by rank. ``"auto"`` measures the first
            three steps; as the fourth begins it simulates and searches for two seconds, and prints what it
            takes: of the orders that leave stages on their ranks, and hold no more microbatches than
            ``in_flight`` says, or without it than a rank does in the first steps.
        loss_fn: called as ``loss_fn(output, target)``, or ``loss_fn(output)`` for a step without target;
            returns a tensor without dimensions. If it is a module, its parameters are trained too.
        devices: one entry for each rank, CPUs or CUDA devices; several ranks may share one. None: as many ranks
            as stages, or half as many for a schedule that holds several stages on a rank, spread over all GPUs
            that torch sees; without any, on the CPU. Stages are moved to their devices, in place. With ``mesh``
            this process's one device alone, as ``["cuda:0"]``; None: where mesh is of "cuda", or a group with
            NCCL, the GPU of torchrun's LOCAL_RANK, otherwise the CPU.
        cuts, balance, sample: where to cut; see ``pipeline_ext.partition.cut``.
        loss_reduction: ``"mean"`` weights a microbatch's loss by its share of the batch's rows, ``"sum"``
            by 1.
        overlap: let a rank's forward and backward tasks run at the same time: on the CPU on a thread each, on
            a GPU on streams of their own. A module may then run forward twice at once where it is recomputed.
            None: on GPUs, and not on the CPU.
        reactive: let a rank whose next planned task is not ready run another that is. The microbatches of
            one stage and kind keep their order, and the limit of microbatches in flight holds; so the
            gradients are the same. False: exactly the planned order; a ``schedule`` that lists it is refused
            where ``pack`` or ``in_flight`` would change it. Always False where ``mesh`` has dimensions beside
            "pp" and "dp", whose processes are to communicate in one order (tensor parallelism).
        pack: K, how many microbatches' gradients leave a stage for the one before in one message: a number,
            ``"all"``, ``"auto"``, or a dict from boundaries to numbers (boundary b is between stages b and
            b + 1; one left out has 1). The stages upstream then hold more microbatches, by what the
            simulated step needs. ``"auto"`` measures the first three steps; as the fourth begins it simulates
            K = 1, 2, 4, ..., and prints what it takes. Stages on one rank hand each result over alone.
        pack_forward: the same for activations.
        pack_skips: a dict from names of skip connections (see ``pipeline_ext.skips``) to K, a number or
            ``"all"``, of the tensors that go from stage to stage and of their gradients; one left out has 1.
        wire: floating-point type that gradients travel as, or a dict from boundaries to types; None: their
            own. They are cast back on arrival.
        wire_forward: the same for activations, in ``eval`` too. A skip connection that begins at stage s
            travels as activations do at boundary s, the gradient of one that ends there as gradients do at
            boundary s - 1.
        in_flight: the most microbatches that a stage may hold at once, or a list of that by stage; None: as
            many as it takes. What would never end within it is refused.
        costs: what ``"zb-auto"`` is searched for, within their ``memory_limit`` or else ``in_flight``; None:
            F = I = W = 1 at each stage. Every schedule keeps the ``memory_limit``: an order that exceeds it
            is refused, and ranks that react begin an F only where it fits.
        link: what messages pass through; a ``LocalLink`` can imitate what a network costs.
        timeout: seconds without a task's begin or end after which a step is given up; on GPUs, seconds that
            ``step`` waits for the step before the last.
        trace: record when each task of a step runs; ``tracing`` says so for the steps to come.
        graphs: on one GPU, capture a whole step in a CUDA graph once two like it have run, and launch that.
            Where that cannot be done steps run as without, and the reason is printed. The parameters' ``.grad``
            are then the graph's own memory, which the next step writes anew.
        optimizer: its ``step`` is called at the end of each step, and is in the graph where there is one; for
            that it is torch's SGD, or made with ``capturable=True``.
        scaler: scales each loss before its backward; the losses that ``step`` returns are as without. After it
            call ``scaler.step(optimizer)`` and ``scaler.update()`` as always. In several processes a
            ``ShardedGradScaler`` over those that hold the stages, so that all of them skip a step together.
        reduction: gives each of several replicas of the pipeline the mean of their gradients. None: one is made
            for the replicas of ``mesh``, if it has any.
        mesh: the processes that share the pipeline, one for each rank; all make it, with the same arguments. A
            ``DeviceMesh``: its dimension "pp"; gradients are averaged over its dimension "dp", if it has one,
            and others are left to the stages; or a process group. What is ``"auto"`` the process of rank 0
            chooses for all. None: this process has all ranks.

    Raises:
        InvalidArgument: for anything above that cannot be used (InvalidSchedule for ``schedule``).
        DeviceError: where the CUDA driver, or a device asked for, cannot be used.

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
        devices: device_choice.DevicesLike = None,
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
        link: LocalLink = FREE_LINK,
        timeout: float = 1800.0,
        trace: bool = True,
        reduction: GradientReduction | None = None,
        graphs: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        mesh: MeshLike = None,
    ) -> None:
        num_stages = None if num_stages is None else arguments.count("num_stages", num_stages)
        microbatches = arguments.count("microbatches", microbatches)
        arguments.check_settings(loss_fn, loss_reduction, timeout)
        timeout = float(timeout)
        arguments.check_type("link", link, LocalLink)
        if costs is not None:
            arguments.check_type("costs", costs, Costs)
        if reduction is not None:
            arguments.check_type("reduction", reduction, GradientReduction)
        if optimizer is not None:
            arguments.check_type("optimizer", optimizer, torch.optim.Optimizer)
        if scaler is not None:
            arguments.check_scaler(scaler, optimizer, many=mesh is not None)
        processes = Processes.of(mesh)
        if processes is not None:
            devices = device_choice.of_process(devices, processes)
            reactive = reactive and not processes.in_order
        given = device_choice.given(devices)
        if overlap is None:
            overlap = device_choice.of_ranks(given, 1)[0].type == "cuda"
        modules = cut(model, num_stages, cuts=cuts, balance=balance, sample=sample)
        wires = arguments.wires("wire", wire, len(modules) - 1)
        wires_forward = arguments.wires("wire_forward", wire_forward, len(modules) - 1)
        ordering = Ordering.of(
            schedule,
            num_stages=len(modules),
            num_ranks=None if given is None else len(given),
            microbatches=microbatches,
            pack=pack,
            pack_forward=pack_forward,
            in_flight=in_flight,
            costs=costs,
            overlap=overlap,
            reactive=reactive,
            graphs=graphs,
        )
        first_steps = ordering.first_steps()
        plan = first_steps.plan
        check_trainable(plan)
        if costs is not None:
            simulate(plan, costs)  # which refuses costs that do not fit
        local = local_stages(modules, plan.rank_of_stage, processes)
        declared = declared_skips(local)
        if processes is not None:
            check_agreement(
                processes,
                {
                    "devices": described_device(given[0]),
                    "microbatches": microbatches,
                    "num_stages": len(modules),
                    "pack": str(pack),
                    "pack_forward": str(pack_forward),
                    "pack_skips": pack_skips,
                    "schedule": [f"{schedule}", *plan.to_csv().splitlines()],
                    "wire": wire,
                    "wire_forward": wire_forward,
                    "loss_reduction": loss_reduction,
                    "overlap": bool(overlap),
                    "reactive": bool(reactive),
                    "in_flight": str(plan.limits),
                    "costs": costs,
                    "graphs": bool(graphs),
                },
                timeout,
                {
                    **{f"stage {i}": local.get(i, module) for i, module in enumerate(modules)},
                    "loss_fn": loss_fn,
                },
            )
            declared = skips_of_all(processes, declared, timeout)
        skips = [skip for skip in find_skips(declared) if skip.source < skip.target]
        skip_names = [skip.name for skip in skips]
        packs_of_skips = arguments.pack_skips(pack_skips or {}, skip_names, microbatches)
        if skips:
            planned = [
                _C.Skip(skip.source, skip.target, pack=k, pack_forward=k)
                for skip, k in zip(skips, packs_of_skips)
            ]
            first_steps = ordering.first_steps(planned)
            plan = first_steps.plan
        repeated = repeated_names(model, loss_fn)
        ties = None
        if processes is not None:
            ties = Ties(modules, loss_fn, plan.rank_of_stage, processes)
            has_loss = len(modules) - 1 in local and isinstance(loss_fn, nn.Module)
            initialise([*local.values(), *([loss_fn] if has_loss else [])], processes.replicas)
            ties.make_equal()
        if reduction is None and processes is not None and processes.replicas is not None:
            reduction = GradientReduction(processes.keep(ProcessGroupMember(processes.replicas)))
        self.microbatches = microbatches
        self._num_stages = len(modules)
        self._stages = [
            Stage(
                index,
                module,
                is_last=index == len(modules) - 1,
                loss_fn=loss_fn if index == len(modules) - 1 else None,
                skips=skips,
                mesh=mesh if isinstance(mesh, DeviceMesh) else None,
            )
            for index, module in local.items()
        ]
        self._local = LocalModel(model, modules, local, repeated, loss_fn)
        self._group = None if processes is None else processes.group
        self._gathering = None if processes is None else TraceGathering(processes, timeout)
        self._first_steps = first_steps
        if processes is not None and first_steps.chooses:
            first_steps.others = OneChooses(processes, self._gathering, timeout)
        self._has_loss = loss_fn is not None
        self.tracing = bool(trace)
        self._devices = device_choice.of_ranks(given, plan.num_ranks)
        if scaler is not None:
            scaler.scale(torch.ones((), device=self._devices[-1]))  # the first call makes what is read then
        shared = SharedParameters({stage.index: stage.modules() for stage in self._stages})
        wrapped = WrappedStages(self._stages, microbatches)
        exchange_of = functools.partial(
            Exchange, wire=wires, wire_forward=wires_forward, link=link, skips=skip_names
        )
        chooses_pack = first_steps.chooses and (schedule != AUTO or processes is not None)
        self._engine = make_engine(
            self._devices, plan, self._stages, exchange_of, shared, reduction, wrapped, chooses_pack, processes
        )
        if reduction is not None:
            try:
                reduction.attach(self._stages, shared, microbatches)
            except BaseException:
                self._engine.close()
                raise
        self._routes = Routes(self._stages, self._engine)
        self._routes.follow(plan)
        self._stepper = Stepper(
            self._stages,
            self._engine,
            self._routes,
            shared,
            self._first_steps,
            reduction,
            wrapped,
            optimizer,
            scaler,
            ties,
            microbatches=microbatches,
            weighted=loss_reduction == "mean",
            timeout=timeout,
        )
        self._graphs = (
            StepGraphs.of(self._engine, self._routes.train, self._stages, optimizer, timeout)
            if graphs
            else None
        )
        _C.keep_freed_memory()
        self._lifetime = Lifetime(self, self._engine)

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
            batch = Batch(
                *self._engine.arrive((args, kwargs), 0),
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
            losses[:] = outcome.losses
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
        trace = self.trace
        if self._gathering is None:
            return trace
        self._lifetime.check()
        with self._lifetime.one_at_a_time("gather_trace was called"):
            return self._gathering.gather(trace)

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
