"""Messages between the GPUs of two processes: NCCL, on the current stream. Not yet run on GPUs."""

import itertools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import PeerError
from ...processes import values
from ...processes.group import Processes
from ...processes.store import prefixed
from . import torch_side

_TIMEOUT = timedelta(minutes=5)  # for another process to make its end


class Pair(Protocol):
    """One direction between two processes. Its messages are in order among themselves only.

    Raises PeerError if the other process cannot be reached.
    """

    def send(self, buffer: Tensor) -> None:
        """Enqueues a send of a contiguous uint8 tensor; returns at once."""

    def receive(self, buffer: Tensor) -> None:
        """Enqueues a receive into a contiguous uint8 tensor of as many bytes as are sent."""

    def abort(self) -> None:
        """Ends all waits for the other process, on the GPU too; any thread may call it."""


class CupyPair:
    """A CuPy communicator. It enqueues onto our own streams, so a graph can capture its messages."""

    def __init__(self, processes: Processes, name: str, device: torch.device, is_sender: bool) -> None:
        """Returns when the other process makes its end too."""
        from cupy.cuda import nccl

        key = f"{processes.name}/nccl/{name}"
        if is_sender:
            processes.store.set(key, values.encode(nccl.get_unique_id()))
        else:
            processes.store.wait([key], _TIMEOUT)
        number = tuple(values.decode(processes.store.get(key)))
        with torch_side.on(device):
            self._communicator: Any = nccl.NcclCommunicator(2, number, 0 if is_sender else 1)
        self._peer = 1 if is_sender else 0
        self._device = device.index
        self._bytes = nccl.NCCL_UINT8

    def send(self, buffer: Tensor) -> None:
        self._enqueue(self._communicator.send, buffer)

    def receive(self, buffer: Tensor) -> None:
        self._enqueue(self._communicator.recv, buffer)

    def abort(self) -> None:
        self._communicator.abort()

    def _enqueue(self, call: Any, buffer: Tensor) -> None:
        (stream,) = torch_side.callers([self._device])
        try:
            call(buffer.data_ptr(), buffer.numel(), self._bytes, self._peer, stream)
        except RuntimeError as error:
            raise PeerError(f"NCCL cannot reach the other process: {error}") from error


class TorchPair:
    """A torch process group. It has its own stream; that stream and ours wait for each other."""

    def __init__(self, processes: Processes, name: str, device: torch.device, is_sender: bool) -> None:
        """Both ends are made before the first message."""
        store = prefixed(f"{processes.name}/nccl/{name}", processes.store)
        with torch_side.on(device):
            # The step itself decides when a receive has waited too long.
            # torch has no type stubs for this form, nor for what such a group can do.
            self._group: Any = dist.ProcessGroupNCCL(store, 0 if is_sender else 1, 2, timedelta(days=1))  # type: ignore[arg-type]
        self._peer = 1 if is_sender else 0

    def send(self, buffer: Tensor) -> None:
        self._enqueue(self._group.send, buffer)

    def receive(self, buffer: Tensor) -> None:
        self._enqueue(self._group.recv, buffer)

    def abort(self) -> None:
        self._group.abort()

    def _enqueue(self, call: Any, buffer: Tensor) -> None:
        try:
            call([buffer], self._peer, 0).wait()  # with NCCL the stream waits, not the host
        except RuntimeError as error:
            raise PeerError(f"NCCL cannot reach the other process: {error}") from error


def carrier() -> str:
    """The library that carries messages: "CuPy", or "torch" if CuPy is missing or has no NCCL."""
    try:
        from cupy.cuda import nccl
    except ImportError:
        return "torch"
    return "CuPy" if nccl.available else "torch"


def make_pairs(
    rank_of_stage: Sequence[int], processes: Processes, device: torch.device
) -> dict[tuple[int, str], Pair]:
    """This process's pairs with others, by boundary and direction: "F" or "B".

    All processes of a pipeline make them together and in the same order, since each waits for the other.
    """
    pairs: dict[tuple[int, str], Pair] = {}
    make = CupyPair if carrier() == "CuPy" else TorchPair
    for boundary, ranks in enumerate(itertools.pairwise(rank_of_stage)):
        if ranks[0] == ranks[1] or processes.rank not in ranks:
            continue
        for direction, sender in zip("FB", ranks):
            name = f"{boundary}{direction}"
            pairs[boundary, direction] = make(processes, name, device, processes.rank == sender)
    return pairs
