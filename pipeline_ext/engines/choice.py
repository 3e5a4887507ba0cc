"""The engine for a pipeline's devices."""

from collections.abc import Callable, Sequence

import torch

from .. import _C
from ..errors import InvalidArgument
from ..processes.group import Processes
from ..reduction import GradientReduction
from ..stages.recomputation import RecomputationGuard
from ..stages.shared_parameters import SharedParameters
from ..stages.stage import Stage
from ..stages.wrapped import WrappedStages
from ..transport.exchange import Exchange
from . import devices as device_choice
from .cuda.device_engine import DeviceEngine
from .cuda.nccl import carrier
from .cuda.process_engine import DeviceProcessEngine
from .host import HostEngine
from .process import ProcessEngine
from .protocol import Engine


def described_device(device: torch.device) -> str:
    """What the devices of processes that share a pipeline must have in common."""
    return device.type if device.type == "cpu" else f"{device.type}, where {carrier()} carries messages"


def make_engine(
    devices: Sequence[torch.device],
    plan: _C.Plan,
    stages: list[Stage],
    exchange_of: Callable[..., Exchange],
    shared: SharedParameters,
    reduction: GradientReduction | None,
    wrapped: WrappedStages,
    chooses_pack: bool,
    processes: Processes | None,
) -> Engine:
    """Threads for CPUs, in one process or in many; streams for GPUs, to which it moves the stages.

    Raises InvalidArgument for what GPUs do not do, DeviceError where one cannot be used.
    """
    wrapped.check(shared, plan, devices[0])
    modules = [stage.module for stage in stages]
    if devices[0].type == "cpu":
        threads = plan.num_workers if processes is None else plan.num_workers // plan.num_ranks
        guard = RecomputationGuard(modules, overlap=plan.overlap, threads=threads)
        if processes is not None:
            return ProcessEngine(plan, exchange_of, shared, guard, reduction, wrapped, processes)
        return HostEngine(plan, exchange_of, shared, guard, reduction, wrapped)
    if reduction is not None:
        raise InvalidArgument(
            'reduction averages gradients of ranks on CPUs; leave it out, or give devices=["cpu", ...]'
        )
    if chooses_pack and processes is not None:
        raise InvalidArgument(
            '"auto" measures processes on CPUs; give a schedule and numbers, or devices=["cpu"]'
        )
    if chooses_pack:
        raise InvalidArgument(
            'pack="auto" measures what packing costs on CPUs; give a number, or devices=["cpu", ...]'
        )
    if plan.skips:
        raise InvalidArgument(
            "skip connections between stages run on CPUs; hand what is skipped along as a part of each stage's "
            'result, cut the model so that each skip lies in one stage, or give devices=["cpu", ...]'
        )
    # One thread enqueues everything, so random numbers are drawn in the plan's order.
    guard = RecomputationGuard(modules, overlap=plan.overlap, threads=1)
    try:
        parts = (devices, stages, plan.rank_of_stage, exchange_of, shared, guard)
        engine = DeviceEngine(*parts) if processes is None else DeviceProcessEngine(*parts, processes)
        of_stage = [devices[plan.rank_of_stage[stage.index]] for stage in stages]
        device_choice.place([stage.modules() for stage in stages], of_stage)
    except BaseException:
        guard.remove()
        raise
    return engine
