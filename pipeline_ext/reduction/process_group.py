"""Replicas in processes of their own, over torch.distributed."""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..base import arguments
from ..base.tensors import describe
from ..errors import InvalidArgument, ReductionError, StepTimeout
from ..processes.connections import Connections
from ..processes.differences import digest, first_difference
from ..processes.notices import Notices
from ..processes.store import asked, default_store, prefixed
from .member import ENDED, UNEQUAL

_made: Counter[str] = Counter()  # members that were made, by the processes of their group

_GRACE = 4.0  # seconds for a process to answer, and to report whom it waits for itself


class ProcessGroupMember:
    """This process's place among replicas, one for each process of a torch.distributed group, on CPUs.

    All processes of the group make one at the same time. Each opens its own gloo connections, so that nothing
    else that uses the group gets between its reductions. A mean is the sum divided by the number of replicas,
    the same bits in each; both are rounded to the tensors' own type. float16 is divided before it is summed, to
    avoid overflow.

    When a step begins the replicas compare what they are about to reduce. They do not wait for the result: the
    first buffers are held back until the comparison succeeds. After ``abort`` or any failure the other
    processes are told, and the member cannot be used any more.
    """

    def __init__(self, group: dist.ProcessGroup, *, timeout: float = 300.0) -> None:
        """Returns when all processes of ``group`` have called it, within ``timeout`` seconds.

        Raises InvalidArgument for anything but a process group, PeerError if a process does not call it,
        StepTimeout if the store of torch.distributed does not answer.
        """
        arguments.check_type("group", group, dist.ProcessGroup)
        self._timeout = timedelta(seconds=timeout)
        self._processes = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank(group)
        self.size = len(self._processes)
        name = "-".join(map(str, self._processes))
        self._store = prefixed(f"pipeline_ext/replicas/{name}/{_made[name]}", default_store())
        _made[name] += 1
        self._connections = Connections(self._store, self._processes, self._timeout)
        self._lock = threading.RLock()
        self._calls = 0  # of begin and all_reduce
        self._agreed = False  # whether all replicas are known to reduce the same in this step
        self._broken: Exception | None = None  # why the comparison failed
        self._held: list[ProcessWork] = []  # until the comparison succeeds
        self._open: set[ProcessWork] = set()
        self._failure: str | None = None
        self._has_failed = threading.Event()
        notices = Notices(self._store, "notices", self.rank, self.size, timeout)
        itself = weakref.ref(self)
        notices.watch(lambda _, text: _fail(itself, text), lambda: _status(itself))
        weakref.finalize(self, notices.close)
        self._notices = notices

    def begin(self, plan: Sequence[str], timeout: float) -> None:
        """Begins to compare ``plan`` with the other members' plans; see ``Member``."""
        self._timeout = timedelta(seconds=timeout)
        with self._lock:
            self._calls += 1
            self._agreed = False
        mine = torch.frombuffer(bytearray(digest(plan).encode()), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        work = self._connections.all_gather(found, mine, self._timeout)
        work.get_future().add_done_callback(lambda future: self._compare(future, plan, mine, found))

    def all_reduce(self, tensor: Tensor) -> "ProcessWork":
        """Begins to replace ``tensor`` by the mean of all members' tensors, and returns at once."""
        if not (tensor.is_floating_point() and tensor.is_contiguous() and tensor.device.type == "cpu"):
            raise InvalidArgument(
                f"the tensor is {describe(tensor)} of strides {tensor.stride()} on {tensor.device}; give a "
                "contiguous one of a floating-point type, on the CPU"
            )
        with self._lock:
            self._calls += 1
            work = ProcessWork(self, self._calls, tensor)
            if self._failure is not None:
                work.future.set_exception(ReductionError(self._failure))
            elif self._broken is not None:
                work.future.set_exception(self._broken)
            else:
                self._open.add(work)
                if self._agreed:
                    work.start(self._connections, self._timeout)
                else:
                    self._held.append(work)
        return work

    def check(self) -> None:
        """Raises ReductionError if the group has failed."""
        if self._failure is not None:
            raise ReductionError(self._failure)

    def abort(self, error: BaseException) -> None:
        """Ends the group: unfinished reductions fail for all members, with ``error`` as the reason."""
        self._end(f"{self._name()} failed with {type(error).__name__}: {error}")

    def close(self, idle: bool = True) -> None:
        """Closes its connections if they are ``idle``; after a failure somebody may still wait in them."""
        self._notices.close()
        self._connections.close(idle and self._failure is None)

    def fail(self, reason: str) -> None:
        """Ends every unfinished reduction in this process."""
        with self._lock:
            if self._failure is None:
                self._failure = f"{reason}; {ENDED}"
            failed, self._open, self._held = self._open, set(), []
        self._has_failed.set()
        for work in failed:
            work.future.set_exception(ReductionError(self._failure))

    def complete(self, work: "ProcessWork", error: Exception | None) -> None:
        """Ends one reduction, unless ``fail`` did."""
        with self._lock:
            if work not in self._open:
                return
            self._open.discard(work)
        if error is None:
            work.future.set_result(time.monotonic_ns())
        else:
            work.future.set_exception(error)

    def diagnose(self, number: int, error: Exception, timeout: float | None) -> Exception:
        """The error to raise where call ``number`` failed with ``error``, or after ``timeout`` seconds.

        Finds out which replicas did not make the call, and tells all others.
        """
        calls = self._notices.ask(_GRACE) or {}
        others = (rank for rank in range(self.size) if rank != self.rank)
        absent = [rank for rank in others if int(calls.get(rank, 0)) < number]
        # A replica that answers and is absent waits for somebody too, and is about to report for whom.
        if self._has_failed.wait(_GRACE if absent and calls.keys() >= set(absent) else 0):
            return ReductionError(self._failure)
        names = " and ".join(map(self._name, absent)) or "the other replicas"
        if timeout is None:
            reason = f"{self._name()} has lost {names}: {error}"
        else:
            reason = f"{self._name()} waited {timeout:g} seconds for {names}"
        self._end(reason)
        return (ReductionError if timeout is None else StepTimeout)(self._failure)

    def __repr__(self) -> str:
        return f"<replica {self.rank} of {self.size}, each a process>"

    def _name(self, rank: int | None = None) -> str:
        """A replica, for error messages; without ``rank`` this one."""
        rank = self.rank if rank is None else rank
        return f"replica {rank} (process {self._processes[rank]})"

    def _end(self, reason: str) -> None:
        first = self._failure is None
        self.fail(reason)
        if first:
            self._notices.tell(reason)

    def _compare(
        self, future: torch.futures.Future, plan: Sequence[str], mine: Tensor, found: Sequence[Tensor]
    ) -> None:
        """Launches the reductions that were held back, if all plans are the same."""
        try:
            future.value()
        except RuntimeError as error:
            with self._lock:
                self._broken = error
                for work in self._held:
                    self.complete(work, error)
                self._held = []
            return
        others = [rank for rank, theirs in enumerate(found) if not torch.equal(theirs, mine)]
        if others:
            self.fail(self._difference(plan, others[0]))
            return
        with self._lock:
            self._agreed = True
            for work in self._held:
                work.start(self._connections, self._timeout)
            self._held = []

    def _difference(self, plan: Sequence[str], other: int) -> str:
        """Where ``plan`` differs from another replica's; that replica calls this too."""

        def exchange() -> list[str]:
            self._store.set(f"plan {self.rank}", "\n".join(plan))
            self._store.wait([f"plan {other}"], timedelta(seconds=_GRACE))
            return self._store.get(f"plan {other}").decode().splitlines()

        try:
            theirs = asked(exchange, _GRACE)
        except (StepTimeout, RuntimeError):
            return f"{self._name()} and {self._name(other)} do not reduce the same"
        ours, its = first_difference(plan, theirs)
        return f"{self._name()} reduces {ours} where {self._name(other)} reduces {its}; {UNEQUAL}"


class ProcessWork:
    """A reduction between processes; see ``Work``."""

    def __init__(self, member: ProcessGroupMember, number: int, tensor: Tensor) -> None:
        self.future: Future[int] = Future()
        self._member = member
        self._number = number
        self._tensor = tensor
        self._work: dist.Work | None = None
        self._began = time.monotonic()

    @property
    def ended(self) -> int:
        """When it ended, in nanoseconds of time.monotonic_ns."""
        return self.future.result()

    def start(self, connections: Connections, timeout: timedelta) -> None:
        """Hands the tensor to ``connections``; gloo's thread ends the reduction."""
        if self._tensor.dtype == torch.float16:
            self._tensor.div_(self._member.size)
        try:
            # Without a timeout this process could not exit while another is stopped.
            self._work = connections.all_reduce(self._tensor, timeout)
        except RuntimeError as error:
            self._member.complete(self, error)
            return
        self._work.get_future().add_done_callback(self._end)

    def wait(self, timeout: float) -> None:
        """Returns when the tensor holds the mean."""
        try:
            self.future.result(timeout)
        except ReductionError:
            raise
        except (TimeoutError, RuntimeError) as error:
            is_late = isinstance(error, TimeoutError) or time.monotonic() - self._began >= timeout
            raise self._member.diagnose(self._number, error, timeout if is_late else None) from error

    def _end(self, future: torch.futures.Future) -> None:
        self._work = None  # it keeps the connections alive
        try:
            future.value()
        except RuntimeError as error:
            self._member.complete(self, error)
            return
        if self._tensor.dtype != torch.float16:
            self._tensor.div_(self._member.size)
        self._member.complete(self, None)


def _fail(member: weakref.ref[ProcessGroupMember], reason: str) -> None:
    if (found := member()) is not None:
        found.fail(reason)


def _status(member: weakref.ref[ProcessGroupMember]) -> str:
    """How many calls it has made, for others that miss one."""
    found = member()
    return "0" if found is None else str(found._calls)
