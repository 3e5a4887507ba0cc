"""Replicas in one process, each in a thread of its own."""

import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor

from ..base import arguments
from ..base.tensors import describe
from ..errors import InvalidArgument, ReductionError, StepTimeout
from .member import ENDED, UNEQUAL

_CHUNK = 2**15  # elements summed at a time: they fit in the cache, and torch starts no threads for so few

Ready = list[tuple[Tensor, Future[int]]]  # a call that all members have made, by rank
Queue = SimpleQueue[Ready | None]


class LocalGroup:
    """Replicas 0..size-1 of one process.

    A mean is the sum in the order of the replicas, in float32 (float64 for float64), divided by their number,
    so every run gives the same bits. A thread of the group computes it, and ends with the group. After
    ``abort`` or any failure the group cannot be used any more.
    """

    def __init__(self, size: int) -> None:
        """Raises InvalidArgument unless ``size`` is a whole number of at least 1."""
        self.size = arguments.count("size", size)
        self._lock = threading.Lock()
        self._calls = [0] * self.size  # by rank
        self._open: dict[int, dict[int, LocalWork]] = {}  # by call and rank, until all ranks have called
        self._failure: str | None = None
        self._ready: Queue = SimpleQueue()
        thread = threading.Thread(target=_serve, args=(self._ready,), name="pe reduction", daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._ready, thread)

    def member(self, rank: int) -> "LocalMember":
        """Replica ``rank``'s place. Raises InvalidArgument for a rank outside the group."""
        if rank not in range(self.size):
            raise InvalidArgument(f"rank is {rank!r}; this group's ranks are 0 to {self.size - 1}")
        return LocalMember(self, rank)

    def check(self) -> None:
        """Raises ReductionError if the group has failed."""
        if self._failure is not None:
            raise ReductionError(self._failure)

    def fail(self, reason: str) -> None:
        """Ends the group: every reduction that waits for members fails."""
        with self._lock:
            if self._failure is None:
                self._failure = f"{reason}; {ENDED}"
            waiting = [work for call in self._open.values() for work in call.values()]
            self._open.clear()
        for work in waiting:
            work.future.set_exception(ReductionError(self._failure))

    def join(self, rank: int, tensor: Tensor) -> "LocalWork":
        """Replica ``rank``'s next call."""
        with self._lock:
            number = self._calls[rank]
            self._calls[rank] += 1
            work = LocalWork(self, rank, number, tensor)
            call = self._open.setdefault(number, {})
            call[rank] = work
            reason = self._failure or _mismatch(*call.values())
            if reason is None and len(call) == self.size:
                del self._open[number]
                works = (call[rank] for rank in range(self.size))
                self._ready.put([(work.tensor, work.future) for work in works])
        if reason is not None:
            self.fail(reason)
        return work

    def absent(self, number: int) -> list[int]:
        """The replicas that have not made call ``number``, for which others wait."""
        with self._lock:
            call = self._open.get(number)
            return [] if call is None else [rank for rank in range(self.size) if rank not in call]


class LocalMember:
    """One replica's place in a LocalGroup; see ``Member``."""

    def __init__(self, group: LocalGroup, rank: int) -> None:
        self.rank = rank
        self.size = group.size
        self._group = group

    def begin(self, plan: Sequence[str], timeout: float) -> None:
        """Does nothing: ``all_reduce`` compares the tensors when all members have called it."""

    def all_reduce(self, tensor: Tensor) -> "LocalWork":
        """Begins to replace ``tensor`` by the mean of all members' tensors, and returns at once."""
        if not (tensor.is_floating_point() and tensor.is_contiguous()):
            raise InvalidArgument(
                f"the tensor is {describe(tensor)} of strides {tensor.stride()}; give a contiguous one of a "
                "floating-point type"
            )
        return self._group.join(self.rank, tensor)

    def check(self) -> None:
        """Raises ReductionError if the group was aborted."""
        self._group.check()

    def abort(self, error: BaseException) -> None:
        """Ends the group: unfinished reductions fail for all members, with ``error`` as the reason."""
        self._group.fail(f"replica {self.rank} failed with {type(error).__name__}: {error}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalMember) and (self._group, self.rank) == (other._group, other.rank)

    def __hash__(self) -> int:
        return hash((self._group, self.rank))

    def __repr__(self) -> str:
        return f"<replica {self.rank} of {self.size} in this process>"


class LocalWork:
    """A reduction in a LocalGroup; see ``Work``."""

    def __init__(self, group: LocalGroup, rank: int, number: int, tensor: Tensor) -> None:
        self.tensor = tensor
        self.rank = rank
        self.future: Future[int] = Future()
        self._group = group
        self._number = number

    @property
    def ended(self) -> int:
        """When it ended, in nanoseconds of time.monotonic_ns."""
        return self.future.result()

    def wait(self, timeout: float) -> None:
        """Returns when the tensor holds the mean."""
        try:
            self.future.result(timeout)
        except TimeoutError:
            absent = self._group.absent(self._number)
            if not absent:  # the group's thread computes it
                self.future.result()
                return
            names = ", ".join(map(str, absent))
            reason = f"replica {self.rank} waited {timeout:g} seconds for replica {names}"
            self._group.fail(reason)
            raise StepTimeout(f"{reason}; does each replica step, in a thread of its own?") from None


def _mismatch(first: LocalWork, *others: LocalWork) -> str | None:
    for other in others:
        if (first.tensor.numel(), first.tensor.dtype) != (other.tensor.numel(), other.tensor.dtype):
            return (
                f"replica {first.rank} reduces {describe(first.tensor)} where replica {other.rank} reduces "
                f"{describe(other.tensor)}; {UNEQUAL}"
            )
    return None


def _serve(queue: Queue) -> None:
    sums: dict[torch.dtype, Tensor] = {}
    for call in iter(queue.get, None):
        _reduce(call, sums)
        del call  # which keeps the tensors alive


def _end(queue: Queue, thread: threading.Thread) -> None:
    queue.put(None)
    if thread is not threading.current_thread():  # the group may be garbage-collected in it
        thread.join()


def _reduce(call: Ready, sums: dict[torch.dtype, Tensor]) -> None:
    try:
        _average([tensor for tensor, _ in call], sums)
    except BaseException as error:
        for _, future in call:
            future.set_exception(ReductionError(f"the reduction raised {type(error).__name__}: {error}"))
        return
    ended = time.monotonic_ns()
    for _, future in call:
        future.set_result(ended)


@torch.no_grad()
def _average(tensors: Sequence[Tensor], sums: dict[torch.dtype, Tensor]) -> None:
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    if dtype not in sums:
        sums[dtype] = torch.empty(_CHUNK, dtype=dtype, device="cpu")
    for parts in zip(*(tensor.view(-1).split(_CHUNK) for tensor in tensors)):
        total = sums[dtype][: len(parts[0])].copy_(parts[0])
        for part in parts[1:]:
            total.add_(part)
        total.div_(len(parts))
        for part in parts:
            part.copy_(total)
