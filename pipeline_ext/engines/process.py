"""One rank of a plan, where each rank is a process: its threads run it, messages tell what the others did."""

import functools
import threading
from collections.abc import Callable

from torch import Tensor

from .. import _C
from ..processes.connections import Connections
from ..processes.failure import GRACE, Failure
from ..processes.group import Processes, seconds
from ..reduction import GradientReduction
from ..stages.recomputation import RecomputationGuard
from ..stages.shared_parameters import SharedParameters
from ..stages.wrapped import WrappedStages
from ..transport.exchange import Exchange
from ..transport.remote import Incoming, Outgoing, Receiver
from .host import HostEngine, HostRoute
from .process_ends import ends_of

_FOREVER = 1e7  # seconds
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
        ends: tuple[Callable, Callable] = (Outgoing, Incoming),
    ) -> None:
        """``ends`` make the sender's and the receiver's of a way to another process; see ``ends_of``."""
        self._processes = processes
        self._ends = ends
        self._failure = Failure(processes.notices(), processes.everyone)
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
        exchange = self._exchange_of(plan, end_of=ends_of(plan, self._processes, *self._ends))
        self._exchanges.append(exchange)
        return HostRoute(plan, _C.Program(plan, dict(bodies)), exchange)

    def agreed(self, count: int | None) -> int:
        return self._processes.agree(count, self._rank_of_first_stage)

    def add_up(self, tensor: Tensor, among: Connections, timeout: float) -> None:
        """Makes ``tensor`` the sum of those of the processes that are connected.

        Raises PeerError where one of them has failed, StepTimeout where one does not come in time.
        """
        # Not for ever, or this process could not exit while another is stopped.
        work = among.all_reduce(tensor, seconds(timeout + GRACE))
        self._failure.finish(work, timeout, "processes that hold one of its parameters, too")

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


def _flush(exchange: Exchange, settled: threading.Event) -> None:
    exchange.flush(_FOREVER)
    settled.set()


def _close(
    close: Callable[[], None], exchanges: list[Exchange], failure: Failure, processes: Processes
) -> None:
    for exchange in exchanges:
        exchange.close(_LEAVING if failure.is_known else _PARTING)
    close()
    failure.close()
    processes.close(idle=not failure.is_known)
