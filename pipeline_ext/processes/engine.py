"""One rank of a plan, where each rank is a process: its threads run it, messages tell what the others did."""

import functools
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _C
from ..errors import PeerError, StepTimeout
from ..host import HostEngine, HostRoute
from ..recomputation import RecomputationGuard
from ..reduction import GradientReduction
from ..shared import SharedParameters
from ..transport.exchange import Exchange
from ..transport.remote import Receiver
from ..wrapped import WrappedStages
from .connections import Connections
from .ends import ends_of
from .group import Processes
from .notice import Notices

_FOREVER = 1e7  # seconds
_GRACE = 1.0  # seconds in which a process that is gone may still be found to have said why
_PARTING = 10.0  # seconds for others to take what was sent them, when a pipeline is closed
_LEAVING = 1.0  # the same after a failure


class ProcessEngine(HostEngine):
    """The ``Engine`` of one of the processes that share a pipeline."""

    def __init__(
        self,
        plan: _C.Plan,
        exchange_of: Callable[..., Exchange],
        shared: SharedParameters,
        guard: RecomputationGuard,
        reduction: GradientReduction | None,
        wrapped: WrappedStages,
        processes: Processes,
    ) -> None:
        self._processes = processes
        self._failure = _Failure(processes.notices(), processes.everyone)
        self._rank_of_first_stage = plan.rank_of_stage[0]
        self._exchanges: list[Exchange] = []
        super().__init__(plan, exchange_of, shared, guard, reduction, wrapped, processes.rank)
        self._failure.watch(self._executor)
        self.close = functools.partial(_close, self.close, self._exchanges, self._failure, processes)

    @property
    def death(self) -> str:
        return HostEngine.death if super().dead else self._failure.describe()

    @property
    def dead(self) -> bool:
        return super().dead or self._failure.is_known

    def route(self, plan: _C.Plan, bodies: dict) -> HostRoute:
        exchange = self._exchange_of(plan, end_of=ends_of(plan, self._processes))
        self._exchanges.append(exchange)
        return HostRoute(plan, _C.Program(plan, dict(bodies)), exchange)

    def agreed(self, count: int | None) -> int:
        told = torch.tensor([0 if count is None else count])
        self._processes.messages.broadcast(told, self._rank_of_first_stage).wait()
        return int(told)

    def add_up(self, tensor: Tensor, among: Connections, timeout: float) -> None:
        """Makes ``tensor`` the sum of those of the processes that are connected.

        Raises PeerError where one of them has failed, StepTimeout where one does not come in time.
        """
        over = self._failure.begin_wait()
        work = among.all_reduce(tensor)
        future = work.get_future()
        future.add_done_callback(lambda _: over.set())
        if not over.wait(min(timeout, threading.TIMEOUT_MAX)):
            raise StepTimeout(f"waited {timeout:g} seconds for processes that hold one of its parameters, too")
        if not future.done():
            raise self._failure.error
        try:
            work.wait()
        except RuntimeError as error:
            raise PeerError(f"a process that holds one of its parameters, too, has gone: {error}") from error

    def run(self, route: HostRoute, *, timeout: float, record: bool) -> _C.StepResult:
        route.exchange.listen(Receiver(self._executor.deliver, self._failure.lost))
        result = super().run(route, timeout=timeout, record=record)
        if result.outcome == "timed out":
            self._failure.seek()
        return result

    def settle(self, route: HostRoute) -> None:
        settled = self._failure.begin_wait()  # a process that has failed may never come for what was sent
        threading.Thread(target=_flush, args=(route.exchange, settled), name="pe settling", daemon=True).start()
        settled.wait()

    def failed(self, reason: str) -> None:
        self._failure.tell(reason)
        for exchange in self._exchanges:
            exchange.give_up()


class _Failure:
    """That a process of a pipeline has failed: this one, which tells the others, or another."""

    def __init__(self, notices: Notices, everyone: list[int]) -> None:
        """``everyone``: those that are told, as numbers in the world."""
        self._notices = notices
        self._everyone = everyone
        self._told = threading.Event()  # by another process
        self._silent: list[int] = []
        self._executor: _C.HostExecutor | None = None
        self._over = threading.Event()  # what this process waits for outside of the executor
        self.is_known = False
        self.error: Exception | None = None  # of another process

    def watch(self, executor: _C.HostExecutor) -> None:
        """Stops what ``executor`` runs once another process has failed."""
        self._executor = executor
        self._notices.watch(self._hear)  # which the pipeline's end closes

    def tell(self, reason: str) -> None:
        """This process has failed; the others are told, unless one of them has told it."""
        if not self._told.is_set():
            self._notices.tell(reason)
        self.is_known = True

    def begin_wait(self) -> threading.Event:
        """Set once another process has failed; the caller sets it for his own ends."""
        self._over.clear()
        if self.error is not None:
            self._over.set()
        return self._over

    def lost(self, error: Exception) -> None:
        """Another process cannot be reached. It may yet be heard why."""
        if not self._told.wait(_GRACE):
            self._stop(error)

    def seek(self) -> None:
        """Finds out who does not answer: whom this process waits for may only wait for that one in turn."""
        answered = self._notices.ask(_GRACE)
        self._silent = [
            process
            for rank, process in enumerate(self._everyone)
            if rank not in answered and process != dist.get_rank()
        ]

    def describe(self) -> str:
        """For people."""
        silent = "".join(f", and process {process} does not answer" for process in self._silent)
        return f"it failed in one of its processes{silent}"

    def close(self) -> None:
        self._notices.close()

    def _hear(self, teller: int | None, text: str) -> None:
        self._told.set()
        who = "" if teller is None else f"process {self._everyone[teller]} failed: "
        self._stop(PeerError(f"{who}{text}"))

    def _stop(self, error: Exception) -> None:
        self.is_known = True
        self.error = error
        self._over.set()
        self._executor.fail(error)


def _flush(exchange: Exchange, settled: threading.Event) -> None:
    exchange.flush(_FOREVER)
    settled.set()


def _close(
    close: Callable[[], None], exchanges: list[Exchange], failure: _Failure, processes: Processes
) -> None:
    for exchange in exchanges:
        exchange.close(_LEAVING if failure.is_known else _PARTING)
    close()
    failure.close()
    processes.close(idle=not failure.is_known)
