"""Builds the parts of a pipeline from its settings, and connects them."""

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from . import _C
from .base import arguments
from .calls.cutting import cut_by_calls
from .calls.model_loss import ModelLoss
from .calls.program import Program
from .calls.stage import CallStage
from .checkpoint.unsplit import LocalModel, repeated_names
from .engines import devices as device_choice
from .engines.choice import described_device, make_engine, make_streams, streams_of_model
from .engines.parts import EngineParts
from .engines.protocol import Engine
from .errors import InvalidArgument
from .microbatches.cutting import Arguments, Cutter
from .microbatches.doubt import Trial
from .model.containers import Containers
from .model.skips import NamedSkip, declared_skips, find_skips
from .partition import by_calls, cut, sample_microbatches
from .plan.build import check_trainable
from .plan.first_steps import FirstSteps
from .plan.ordering import Ordering
from .plan.simulation import simulate
from .reduction.replica_reduction import ReplicaReduction
from .settings import Settings
from .stages.initialisation import initialise
from .stages.local import local_stages
from .stages.loss_view import LossView
from .stages.parameter_hooks import ParameterHooks
from .stages.reach import Owners
from .stages.shared_parameters import SharedParameters
from .stages.stage import Stage
from .stages.wrapped import WrappedStages
from .step.graphs import StepGraphs
from .step.nonfinite import RAISE, SKIP, NonFinite
from .step.routes import Routes
from .step.sharing import OneProcess, sharing_of
from .step.stepper import Stepper
from .step.verify import Unsplit
from .transport.exchange import Exchange
from .transport.link import current_link


@dataclass(frozen=True)
class Assembly:
    """The parts of a pipeline.

    Attributes:
        num_stages: the number of stages of the whole pipeline.
        stages: the stages of this process.
        local: this process's part of the unsplit model.
        containers: those of the model that were taken apart.
        program: the calls of a model that was cut by its own forward.
        has_loss: whether steps train.
        sharing: how processes share the pipeline.
        devices: one for each rank.
        first_steps: resolves every "auto".
        graphs: captures whole steps; None without ``graphs=True``.
        unsplit: the model as plain autograd runs it; None if that cannot be in this process.
    """

    num_stages: int
    stages: list[Stage]
    local: LocalModel
    containers: Containers
    program: Program | None
    has_loss: bool
    sharing: OneProcess
    devices: list[torch.device]
    first_steps: FirstSteps
    engine: Engine[Any]
    routes: Routes
    stepper: Stepper
    graphs: StepGraphs | None
    unsplit: Unsplit | None


def assemble(settings: Settings, sample: Sequence[Arguments] | None = None) -> Assembly:
    """Makes the parts of a pipeline. Raises as ``Pipeline`` does, with nothing left running.

    ``sample``: microbatches, if not from the settings.
    """
    sharing = sharing_of(settings.mesh, settings.timeout)
    given = device_choice.given(sharing.devices(settings.devices))
    modules = _cut(settings, sharing, sample)
    program = modules[0].program if isinstance(modules[0], CallStage) else None
    if program is not None:
        settings = replace(settings, loss_fn=settings.loss_fn or ModelLoss())
    exchange_of = functools.partial(
        Exchange,
        wire=arguments.wires("wire", settings.wire, len(modules) - 1),
        wire_forward=arguments.wires("wire_forward", settings.wire_forward, len(modules) - 1),
        link=current_link(),
    )
    planned = _planned(settings, modules, given, sharing)
    plan, local, skips, devices = planned.first_steps.plan, planned.local, planned.skips, planned.devices
    if program is not None and program.drew is not None and any(device.type == "cuda" for device in devices):
        raise InvalidArgument(
            f"code of the {type(program.model).__name__} around its units draws random numbers "
            f"({program.drew}); every stage runs it, and on GPUs each would draw others: draw them in a layer "
            "of its own, as nn.Dropout"
        )
    repeated = repeated_names(settings.model, settings.loss_fn)
    here = list(local.values())
    if len(modules) - 1 in local and isinstance(settings.loss_fn, nn.Module):
        here.append(settings.loss_fn)
    if program is not None and 0 in local:
        here.append(program.unused)
    ties = sharing.make_equal(
        modules,
        here,
        settings.loss_fn,
        plan.rank_of_stage,
        functools.partial(initialise, *(() if program is None else (program.model, program.around))),
    )
    if program is not None:
        program.settle(here, drops=sharing.group is not None)
    reduction = sharing.reduction(devices[0]) if settings.reduction is None else settings.reduction
    shared, owners, loss_view = _ownership(settings, modules, planned, reduction)
    elsewhere = {i: m for i, m in enumerate(modules) if i not in local and isinstance(m, nn.Module)}
    stages = _stages(settings, len(modules), local, elsewhere, skips, owners, loss_view)
    unsplit = _unsplit(settings, len(modules), local, program)
    local_model = LocalModel(settings.model, modules, local, repeated, settings.loss_fn)
    if settings.scaler is not None:
        # The first call makes the tensors that steps read.
        settings.scaler.scale(torch.ones((), device=devices[-1]))
    parts = EngineParts(
        plan=plan,
        devices=devices,
        stages=stages,
        exchange_of=functools.partial(exchange_of, skips=[skip.name for skip in skips]),
        shared=shared,
        wrapped=WrappedStages(stages, settings.microbatches),
        reduction=reduction,
        non_blocking=settings.non_blocking,
        partners=sharing.partners,
    )
    if planned.first_steps.chooses and devices[0].type == "cuda":
        sharing.check_gpu_choice(settings.schedule, planned.first_steps.weighs)
        planned.first_steps.timed = False
    if callable(settings.loss_weight) and parts.wrapped:
        raise InvalidArgument(
            "loss_weight needs the counts of all replicas, which a stage in fully_shard or "
            "DistributedDataParallel does not share; replicate the pipeline with the dimension 'dp' of mesh, "
            "or with reduction="
        )
    if settings.nonfinite in (RAISE, SKIP) and (parts.wrapped or sharing.partners):
        raise InvalidArgument(
            f"nonfinite={settings.nonfinite!r} drops a step in all processes, and those of a stage in "
            "fully_shard, DistributedDataParallel or tensor parallelism see different parts of its values; "
            'give nonfinite="warn", and pipe.clip_grad_norm_(..., error_if_nonfinite=True)'
        )
    engine = make_engine(parts, sharing.engines)
    try:
        if reduction is not None:
            reduction.attach(stages, shared, settings.microbatches)
        routes = Routes(stages, engine)
        routes.follow(plan)
        graphs = (
            StepGraphs.of(engine, routes.train, stages, ties, settings.optimizer, settings.timeout)
            if settings.graphs
            else None
        )
    except BaseException:
        engine.close()
        raise
    stepper = Stepper(
        stages=stages,
        engine=engine,
        routes=routes,
        shared=shared,
        owners=owners,
        loss_view=loss_view,
        hooks=ParameterHooks(owners, settings.microbatches),
        random=make_streams(
            [devices[rank] for rank in plan.rank_of_stage],
            sharing.any_of_all(engine),
            0 if reduction is None else reduction.rank,
        ),
        wrapped=parts.wrapped,
        ties=ties,
        first_steps=planned.first_steps,
        cutter=Cutter(
            _batch_dim(settings, local.values()),
            settings.args_spec,
            settings.kwargs_spec,
            settings.target_spec,
            None if parts.wrapped else _trial(local, unsplit),
        ),
        reduction=reduction,
        optimizer=settings.optimizer,
        scaler=settings.scaler,
        microbatches=settings.microbatches,
        weighted=settings.loss_reduction == "mean",
        loss_weight=settings.loss_weight,
        timeout=settings.timeout,
        nonfinite=NonFinite(
            policy=settings.nonfinite,
            stages=stages,
            owners=owners,
            num_stages=len(modules),
            add_up=sharing.add_up(engine),
            reduction=reduction,
            scaled=settings.scaler is not None,
        ),
    )
    _C.keep_freed_memory()
    return Assembly(
        num_stages=len(modules),
        stages=stages,
        local=local_model,
        containers=Containers(settings.model, local),
        program=program,
        has_loss=settings.loss_fn is not None,
        sharing=sharing,
        devices=devices,
        first_steps=planned.first_steps,
        engine=engine,
        routes=routes,
        stepper=stepper,
        graphs=graphs,
        unsplit=None if reduction is not None or settings.loss_fn is None else unsplit,
    )


def _cut(settings: Settings, sharing: OneProcess, sample: Sequence[Arguments] | None) -> list[Any]:
    """What becomes of the stages: modules, or functions that make them."""
    if not by_calls(settings.model):
        return cut(
            settings.model,
            settings.num_stages,
            cuts=settings.cuts,
            balance=settings.balance,
            sample=settings.sample,
        )
    assert isinstance(settings.model, nn.Module)
    return [
        *cut_by_calls(
            settings.model,
            settings.num_stages,
            sample or sample_microbatches(settings),
            cuts=settings.cuts,
            balance=settings.balance,
            loss_fn=settings.loss_fn,
            agreed=sharing.as_in_the_first,
            random=streams_of_model(settings.model),
        )
    ]


class _Planned(NamedTuple):
    first_steps: FirstSteps  # with the first plan
    local: dict[int, nn.Module]  # the stages of this process
    skips: list[NamedSkip]  # between different stages
    devices: list[torch.device]  # one for each rank


def _planned(
    settings: Settings, modules: Sequence[Any], given: list[torch.device] | None, sharing: OneProcess
) -> _Planned:
    """Plans the step, and agrees on it with the other processes."""
    ordering = _ordering(settings, len(modules), given, sharing)
    first_steps = ordering.first_steps()
    plan = first_steps.plan
    check_trainable(plan)
    if settings.costs is not None:  # costs that do not fit are refused
        simulate(plan, replace(settings.costs, act_memory=0.0) if ordering.weighs else settings.costs)
    local = local_stages(modules, plan.rank_of_stage, sharing.holds)
    declared = declared_skips(local)
    sharing.check_agreement(
        lambda: _agreed(settings, ordering, plan, described_device(device_choice.of_ranks(given, 1)[0])),
        lambda: {
            **{f"stage {i}": local.get(i, module) for i, module in enumerate(modules)},
            "loss_fn": settings.loss_fn,
        },
    )
    skips = [s for s in find_skips(sharing.skips_of_all(declared)) if s.source < s.target]
    planned_skips = _planned_skips(settings, skips)
    if planned_skips:
        first_steps = ordering.first_steps(planned_skips)
    sharing.choose_together(first_steps)
    return _Planned(first_steps, local, skips, device_choice.of_ranks(given, plan.num_ranks))


def _unsplit(
    settings: Settings, num_stages: int, local: Mapping[int, nn.Module], program: Program | None
) -> Unsplit | None:
    if len(local) < num_stages:
        return None
    model = settings.model if isinstance(settings.model, nn.Module) else None
    return Unsplit(model, local, settings.loss_fn, settings.stage_loss, program)


def _trial(local: Mapping[int, nn.Module], unsplit: Unsplit | None) -> Trial | None:
    """What settles doubts about inputs: the model, or its first stage if that is all that is here."""
    if 0 not in local:
        return None

    if unsplit is not None:
        return Trial(local.values(), unsplit.output, is_whole=True)
    return Trial.of(local[0], is_whole=False)


def _ordering(
    settings: Settings, num_stages: int, given: list[torch.device] | None, sharing: OneProcess
) -> Ordering:
    on_gpus = device_choice.of_ranks(given, 1)[0].type == "cuda"
    overlap = on_gpus if settings.overlap is None else settings.overlap
    return Ordering.of(
        settings.schedule,
        num_stages=num_stages,
        num_ranks=None if given is None else len(given),
        microbatches=settings.microbatches,
        pack=settings.pack,
        pack_forward=settings.pack_forward,
        in_flight=settings.in_flight,
        costs=settings.costs,
        overlap=overlap,
        # One process decides for its partners what one thread runs; two have no order among each other.
        reactive=settings.reactive and not (sharing.partners and (overlap or on_gpus)),
        graphs=settings.graphs,
        processes=sharing.group is not None,
    )


def _batch_dim(settings: Settings, modules: Iterable[nn.Module]) -> int:
    """The dimension of the batch; warns where a layer suggests that it is not the first."""
    if settings.batch_dim is not None:
        return settings.batch_dim
    layers = (layer for module in modules for layer in module.modules())
    sequence_first = next((layer for layer in layers if getattr(layer, "batch_first", True) is False), None)
    if sequence_first is not None:
        warnings.warn(
            f"the model has a {type(sequence_first).__name__} with batch_first=False, and batches are cut "
            "along dimension 0; give batch_dim=1 if the batch is dimension 1 of the inputs, or batch_dim=0 if "
            "it is the first, which ends this warning",
            stacklevel=4,
        )
    return 0


def _planned_skips(settings: Settings, skips: Sequence[NamedSkip]) -> list[_C.Skip]:
    names = [skip.name for skip in skips]
    packs = arguments.pack_skips(settings.pack_skips or {}, names, settings.microbatches)
    return [
        _C.Skip(skip.source, skip.target, pack=k, pack_forward=k) for skip, k in zip(skips, packs, strict=True)
    ]


def _ownership(
    settings: Settings, stages: Sequence[Any], planned: _Planned, reduction: ReplicaReduction[Any] | None
) -> tuple[SharedParameters, Owners, LossView | None]:
    """Which stages hold which parameters, and what the loss function sees of them.

    It sees only its own stage's where another stage may be in another process, run on GPU streams, or have
    handed its gradients to replicas already.
    """
    last, local = len(stages) - 1, planned.local
    of_loss = [settings.loss_fn] if isinstance(settings.loss_fn, nn.Module) else []
    given = {**dict(enumerate(stages)), **local}
    by_stage = {
        index: [stage, *(of_loss if index == last else [])]
        for index, stage in given.items()
        if isinstance(stage, nn.Module)
    }
    shared = SharedParameters({index: by_stage[index] for index in local})
    loss_view = None
    if len(local) == len(stages) > 1 and planned.devices[0].type == "cpu" and reduction is None:
        loss_view = LossView(shared, [local[index] for index in range(last)])
    return shared, Owners(by_stage), loss_view


def _stages(
    settings: Settings,
    num_stages: int,
    local: Mapping[int, nn.Module],
    elsewhere: Mapping[int, nn.Module],
    skips: Sequence[NamedSkip],
    owners: Owners,
    loss_view: LossView | None,
) -> list[Stage]:
    return [
        Stage(
            index,
            module,
            is_last=index == num_stages - 1,
            loss_fn=settings.loss_fn if index == num_stages - 1 else None,
            stage_loss=settings.stage_loss,
            skips=skips,
            mesh=settings.mesh if isinstance(settings.mesh, DeviceMesh) else None,
            owners=owners,
            elsewhere=elsewhere,
            loss_view=loss_view,
        )
        for index, module in local.items()
    ]


def _agreed(settings: Settings, ordering: Ordering, plan: _C.Plan, device: str) -> dict[str, Any]:
    """The settings that must be the same in all processes, by name."""
    return {
        "devices": device,
        "microbatches": settings.microbatches,
        "num_stages": plan.num_stages,
        "pack": str(settings.pack),
        "pack_forward": str(settings.pack_forward),
        "pack_skips": settings.pack_skips,
        "schedule": [f"{settings.schedule}", *plan.to_csv().splitlines()],
        "wire": settings.wire,
        "wire_forward": settings.wire_forward,
        "loss_reduction": settings.loss_reduction,
        "loss_weight": callable(settings.loss_weight),
        "overlap": ordering.overlap,
        "reactive": ordering.reactive,
        "in_flight": str(plan.limits),
        "costs": settings.costs,
        "graphs": bool(settings.graphs),
        "nonfinite": settings.nonfinite,
    }
