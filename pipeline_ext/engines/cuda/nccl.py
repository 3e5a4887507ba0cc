"""Messages between the GPUs of processes: NCCL, on the current stream. Not yet run on GPUs."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import PeerError
from ...processes.group import Processes
from ...processes.store import Store, asked
from . import torch_side

_TIMEOUT = timedelta(minutes=5)  # for another process to make its end
_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


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


class Sums(Protocol):
    """Sums over some processes. Raises as ``Pair`` does."""

    def add_up(self, tensor: Tensor) -> None:
        """Enqueues that a contiguous float32 or float64 tensor becomes the sum of all processes' tensors.

        All call it in the same order, with tensors of the same size and type.
        """

    def abort(self) -> None:
        """As ``Pair``."""


class _Cupy:
    """A CuPy communicator. It enqueues onto our own streams, so a graph can capture what it does."""

    def __init__(self, store: Store, device: torch.device, rank: int, size: int) -> None:
        """Returns when all processes make theirs; ``store`` is used for nothing else."""
        from cupy.cuda import nccl

        def number() -> bytes:
            if rank == 0:
                store.set("number", nccl.get_unique_id())
            else:
                store.wait(["number"], _TIMEOUT)
            return store.get("number")

        with torch_side.on(device):
            found = asked(number, _TIMEOUT.total_seconds())
            self._communicator: Any = nccl.NcclCommunicator(size, found, rank)
        self._device = device.index
        self._nccl = nccl

    def abort(self) -> None:
        self._communicator.abort()

    def _enqueue(self, call: Any, *args: Any) -> None:
        (stream,) = torch_side.callers([self._device])
        with _reaching_others():
            call(*args, stream)


class CupyPair(_Cupy):
    """The ``Pair`` that rank 0 sends over."""

    def __init__(self, store: Store, device: torch.device, rank: int) -> None:
        super().__init__(store, device, rank, 2)
        self._peer = 1 - rank

    def send(self, buffer: Tensor) -> None:
        self._move(self._communicator.send, buffer)

    def receive(self, buffer: Tensor) -> None:
        self._move(self._communicator.recv, buffer)

    def _move(self, call: Any, buffer: Tensor) -> None:
        self._enqueue(call, buffer.data_ptr(), buffer.numel(), self._nccl.NCCL_UINT8, self._peer)


class CupySums(_Cupy):
    """``Sums`` of a CuPy communicator."""

    def add_up(self, tensor: Tensor) -> None:
        at, kind = tensor.data_ptr(), self._nccl.NCCL_FLOAT32
        if tensor.dtype == torch.float64:
            kind = self._nccl.NCCL_FLOAT64
        self._enqueue(self._communicator.allReduce, at, at, tensor.numel(), kind, self._nccl.NCCL_SUM)


class _Torch:
    """A torch process group. It has its own stream; that stream and ours wait for each other."""

    def __init__(self, store: Store, device: torch.device, rank: int, size: int) -> None:
        """``store`` is used for nothing else."""
        with torch_side.on(device), _errors_left_to_us():
            # The step itself decides when a receive has waited too long.
            # torch has no type stubs for this form, nor for what such a group can do.
            self._group: Any = dist.ProcessGroupNCCL(store, rank, size, timedelta(days=1))  # type: ignore[arg-type]

    def abort(self) -> None:
        self._group.abort()

    def _enqueue(self, call: Any, *args: Any) -> None:
        with _reaching_others():
            call(*args).wait()  # with NCCL the stream waits, not the host


class TorchPair(_Torch):
    """The ``Pair`` that rank 0 sends over. Both ends are made before the first message."""

    def __init__(self, store: Store, device: torch.device, rank: int) -> None:
        super().__init__(store, device, rank, 2)
        self._peer = 1 - rank

    def send(self, buffer: Tensor) -> None:
        self._enqueue(self._group.send, [buffer], self._peer, 0)

    def receive(self, buffer: Tensor) -> None:
        self._enqueue(self._group.recv, [buffer], self._peer, 0)


class TorchSums(_Torch):
    """``Sums`` of a torch process group."""

    def add_up(self, tensor: Tensor) -> None:
        self._enqueue(self._group.allreduce, [tensor])


@contextlib.contextmanager
def _errors_left_to_us() -> Iterator[None]:
    """Within it torch makes groups whose watchdog does not end the process when another has aborted its end.

    A step that fails tells all processes why, and each then aborts its groups itself.
    """
    before = os.environ.get(_ERRORS)
    os.environ[_ERRORS] = "0"  # which torch reads when it makes a group
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ERRORS]
        else:
            os.environ[_ERRORS] = before


@contextlib.contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
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
    make = CupyPair if _carrier() == "CuPy" else TorchPair
    for boundary, ranks in enumerate(itertools.pairwise(rank_of_stage)):
        if ranks[0] == ranks[1] or processes.rank not in ranks:
            continue
        for direction, sender in zip("FB", ranks):
            store = processes.own_store(f"nccl/{boundary}{direction}", processes.members)
            pairs[boundary, direction] = make(store, device, 0 if processes.rank == sender else 1)
    return pairs


def make_sums(processes: Processes, device: torch.device) -> Sums | None:
    """Sums over this process's replicas, which all make them together; None without replicas."""
    if processes.replicas is None:
        return None
    members = dist.get_process_group_ranks(processes.replicas)
    store = processes.own_store("nccl/replicas", members)
    make = CupySums if _carrier() == "CuPy" else TorchSums
    return make(store, device, members.index(processes.number), len(members))


def _carrier() -> str:
    # One GPU has several communicators. Processes enqueue onto them in one order, and with this NCCL, from 2.26
    # on, starts their operations in that order. It reads the variable once, before its first operation.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    return carrier()
