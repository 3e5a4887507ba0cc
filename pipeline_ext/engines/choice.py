"""Chooses the engine for a pipeline's devices."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InvalidArgument
from ..reduction import GradientReduction, Member
from ..reduction.replica_reduction import ReplicaReduction
from ..stages.random_streams import AnyOfAll, RandomStreams
from . import devices as device_choice
from .cuda.device_engine import DeviceEngine
from .cuda.device_streams import DeviceStreams
from .cuda.nccl import carrier
from .cuda.process_engine import DeviceProcessEngine
from .cuda.replicas import DeviceReduction
from .host import HostEngine
from .parts import EngineParts
from .process import ProcessEngine
from .protocol import Engine


class EngineTypes(NamedTuple):
    """The functions that make an engine from its parts, on CPUs and on GPUs."""

    host: Callable[..., Engine[Any]]
    device: Callable[..., Engine[Any]]


ONE_PROCESS = EngineTypes(HostEngine, DeviceEngine)
MANY_PROCESSES = EngineTypes(ProcessEngine, DeviceProcessEngine)  # these take ``processes`` too


def described_device(device: torch.device) -> str:
    """A description of the device, the same in all processes that may share a pipeline."""
    return device.type if device.type == "cpu" else f"{device.type}, where {carrier()} carries messages"


def make_streams(devices: Sequence[torch.device], any_of_all: AnyOfAll | None, replica: int) -> RandomStreams:
    """Makes the streams of random numbers of stages on ``devices``; see ``RandomStreams``."""
    if devices[0].type == "cpu":
        return RandomStreams(any_of_all, replica)
    return DeviceStreams(devices, any_of_all, replica)


def streams_of_model(model: nn.Module) -> RandomStreams:
    """Makes the streams of random numbers of a whole model on the GPU it is on, or on the CPU."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), torch.device("cpu"))
    return make_streams([device], None, 0)


def make_reduction(member: Member, device: torch.device) -> ReplicaReduction[Any]:
    """Makes what averages the gradients of replicas whose stages are on devices like this one."""
    return GradientReduction(member) if device.type == "cpu" else DeviceReduction(member)


def make_engine(parts: EngineParts, types: EngineTypes) -> Engine[Any]:
    """Makes an engine: threads for CPUs, or streams for GPUs, to which it moves the stages.

    Raises InvalidArgument for what GPUs do not support, DeviceError if one cannot be used.
    """
    parts.wrapped.check(parts.shared, parts.plan, parts.devices[0], parts.partners)
    if parts.devices[0].type == "cpu":
        return types.host(parts)
    if isinstance(parts.reduction, GradientReduction):
        raise InvalidArgument(
            "reduction averages gradients as soon as the host has run their last backward, and the host runs "
            "ahead of GPUs; leave it out and average .grad of the replicas after each step, or give "
            'devices=["cpu", ...]'
        )
    engine = types.device(parts)
    try:
        of_stage = [parts.devices[parts.plan.rank_of_stage[stage.index]] for stage in parts.stages]
        device_choice.place([stage.modules() for stage in parts.stages], of_stage)
    except BaseException:
        engine.close()
        raise
    return engine
