"""Ranks as processes: the threads of this one run its rank, and messages tell what the others did."""

import functools
import threading
from collections.abc import Callable

from torch import Tensor

from .. import _C
from ..errors import PipelineError, StepTimeout
from ..processes.connections import Connections
from ..processes.failure import GRACE, Failure
from ..processes.group import Processes, seconds
from ..transport.decisions import DecisionSender
from ..transport.exchange import Exchange
from ..transport.remote_receiver import Listener, RemoteReceiver
from ..transport.remote_sender import RemoteSender
from .host import HostEngine, HostRoute
from .parts import EngineParts
from .protocol import Bodies
from .remote_channels import decisions_of, remote_channels

_FOREVER = 1e7  # seconds
_CLOSE_WAIT = 10.0  # seconds that a pipeline, when closed, waits for others to receive what it sent
_CLOSE_WAIT_FAILED = 1.0  # the same after a failure


class ProcessEngine(HostEngine):
    """The ``Engine`` of one of the processes that share a pipeline."""

    def __init__(
        self,
        parts: EngineParts,
        processes: Processes,
        channel_types: tuple[Callable, Callable] = (RemoteSender, RemoteReceiver),
    ) -> None:
        """``channel_types`` make senders and receivers; see ``remote_channels``."""
        self._processes = processes
        self._channel_types = channel_types
        self._decides = parts.plan.reactive and len(processes.partners) > 1
        self._failure = Failure(processes.notices(), processes.informed)
        self._rank_of_first_stage = parts.plan.rank_of_stage[0]
        self._exchanges: list[Exchange] = []
        self._routes: dict[_C.Plan, HostRoute] = {}  # a plan may be followed again: its threads live on
        super().__init__(parts, processes.rank, follows=self._decides and not processes.leads)
        self._failure.watch(self._executor)
        self.close = functools.partial(_close, self.close, self._exchanges, self._failure, processes)

    @property
    def interruption(self) -> Exception | None:
        return self._failure.error

    @property
    def death(self) -> str:
        return f"{super().death}{self._failure.silence}" if super().dead else self._failure.describe()

    @property
    def dead(self) -> bool:
        return super().dead or self._failure.is_known

    def route(self, plan: _C.Plan, bodies: Bodies) -> HostRoute:
        if plan not in self._routes:
            remote_channel_of = remote_channels(plan, self._processes, *self._channel_types)
            decisions = decisions_of(plan, self._processes) if self._decides else None
            if isinstance(decisions, DecisionSender):
                bodies = decisions.telling(bodies)
            exchange = self._exchange_of(plan, remote_channel_of=remote_channel_of, decisions=decisions)
            self._exchanges.append(exchange)
            self._routes[plan] = HostRoute(plan, _C.Program(plan, dict(bodies)), exchange)
        return self._routes[plan]

    def agreed_count(self, count: int | None) -> int:
        try:
            return self._processes.agree(count, self._rank_of_first_stage, self._failure.finish)
        except PipelineError as error:
            self.failed(str(error))
            raise

    def add_up(self, tensor: Tensor, among: Connections, timeout: float) -> None:
        # With a limit, so that this process can exit while another is stopped.
        work = among.all_reduce(tensor, seconds(timeout + GRACE))
        self._failure.finish(work, timeout, among.others)

    def run(self, route: HostRoute, *, timeout: float, record: bool) -> _C.StepResult:
        route.exchange.listen(Listener(self._executor.deliver, self._executor.decide, self._failure.lost))
        result = super().run(route, timeout=timeout, record=record)
        if result.outcome == "timed out":
            self._failure.seek()
        return result

    def settle(self, route: HostRoute, timeout: float) -> None:
        settled = self._failure.begin_wait()  # a failed process may never receive what was sent
        threading.Thread(target=_flush, args=(route.exchange, settled), name="pe settling", daemon=True).start()
        if not settled.wait(min(timeout, threading.TIMEOUT_MAX)):
            self._failure.seek()
            raise StepTimeout(
                f"waited {timeout:g} seconds for {self._processes.messages.others} to receive what the step "
                f"has sent{self._failure.silence}"
            )

    def failed(self, reason: str) -> None:
        self._failure.tell(f"{reason}{self._failure.silence}")
        for exchange in self._exchanges:
            exchange.give_up()


def _flush(exchange: Exchange, settled: threading.Event) -> None:
    exchange.flush(_FOREVER)
    settled.set()


def _close(
    close: Callable[[], object], exchanges: list[Exchange], failure: Failure, processes: Processes
) -> None:
    for exchange in exchanges:
        exchange.close(_CLOSE_WAIT_FAILED if failure.is_known else _CLOSE_WAIT)
    close()
    failure.close()
    processes.close(idle=not failure.is_known)
