"""Resolves ``devices=`` to a device for each rank."""

import os
from collections.abc import Sequence

import torch
from torch import nn

from .. import _C
from ..errors import DeviceError, InvalidArgument
from ..processes.group import Processes
from .cuda import torch_side

DevicesLike = Sequence[str | torch.device] | None


def given(devices: DevicesLike) -> list[torch.device] | None:
    """The devices that the user named, each GPU with its number; None for None.

    Raises InvalidArgument for a name that is no device, a device that is not there, or a mix of CPUs and GPUs;
    DeviceError if the driver cannot be used.
    """
    if devices is None:
        return None
    as_given: object = devices
    if not isinstance(as_given, list | tuple) or not as_given:
        raise InvalidArgument(
            f'devices is {devices!r}; give a list with one entry for each rank, as in ["cpu", "cpu"] or '
            '["cuda:0", "cuda:1"]'
        )
    found = [_device(device) for device in devices]
    kinds = sorted({device.type for device in found})
    if len(kinds) > 1:
        raise InvalidArgument(f"devices holds {' and '.join(kinds)}; give all ranks devices of one type")
    if kinds == ["cuda"]:
        there = _usable_gpus()
        current = torch_side.current_device()
        # torch's stub says that index is an int; of "cuda" it is None.
        found = [
            torch.device("cuda", current if d.index is None else d.index)  # type: ignore[redundant-expr]
            for d in found
        ]
        for device in found:
            if device.index >= there:
                raise InvalidArgument(
                    f"devices holds '{device}', and torch sees {there} of them: cuda:0 to cuda:{there - 1}"
                )
    return found


def of_process(devices: DevicesLike, processes: Processes) -> Sequence[str | torch.device]:
    """This process's device, once for each process of the pipeline: the others' devices are unknown here.

    ``devices`` None: the CPU. If processes have GPUs, it is the GPU of torchrun's LOCAL_RANK, or the current
    one if that is not set.

    Raises InvalidArgument for more than one device.
    """
    if devices is None:
        devices = [f"cuda:{_own_gpu()}" if processes.have_gpus else "cpu"]
    if not isinstance(devices, (list, tuple)) or len(devices) != 1:
        raise InvalidArgument(
            f"devices is {devices!r}; with mesh, whose processes are the ranks, give a list with this "
            'process\'s device alone, as in ["cuda:0"], or leave it out'
        )
    return list(devices) * processes.size


def of_ranks(given: list[torch.device] | None, num_ranks: int) -> list[torch.device]:
    """A device for each rank: those given; otherwise neighbouring ranks share the visible GPUs, or the CPU."""
    if given is not None:
        return given
    gpus = torch_side.num_devices()
    if not gpus:
        return [torch.device("cpu")] * num_ranks
    return [torch.device("cuda", rank * min(gpus, num_ranks) // num_ranks) for rank in range(num_ranks)]


def place(modules: Sequence[Sequence[nn.Module]], devices: Sequence[torch.device]) -> None:
    """Moves the modules of each stage to its device; both are by stage.

    Raises InvalidArgument, before it moves any, if a parameter or buffer would have to be on two devices.
    """
    places: dict[torch.Tensor, torch.device] = {}
    for of_stage, device in zip(modules, devices):
        for module in of_stage:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if places.setdefault(tensor, device) != device:
                    raise InvalidArgument(
                        f"stages on {places[tensor]} and {device} share {name!r}; give them one device, or "
                        "cut so that both are on one rank"
                    )
    for of_stage, device in zip(modules, devices):
        for module in of_stage:
            torch_side.move_module(module, device)


def _own_gpu() -> int:
    """The ordinal of this process's GPU, whether it sees all GPUs of its machine or only its own."""
    there = _usable_gpus()
    return int(os.environ["LOCAL_RANK"]) % there if "LOCAL_RANK" in os.environ else torch_side.current_device()


def _device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidArgument(f"devices holds {device!r}, which is no device") from error
    if found.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"devices holds {device!r}; ranks run on CPUs and on CUDA devices")
    return found


def _usable_gpus() -> int:
    there = torch_side.num_devices()
    if there:
        return there
    _C.num_devices()  # raises and says why there is none
    raise DeviceError(
        "devices holds a GPU, which the driver sees and torch does not; this torch is "
        + (f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build")
    )
