"""Ranks as processes, each with a GPU: NCCL carries messages between their streams. Not yet run on GPUs."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import PeerError, StepTimeout
from ...processes.connections import Connections
from ...processes.failure import GRACE, Failure
from ...processes.group import Processes, seconds
from ...stages.recomputation import RecomputationGuard
from ...stages.shared_parameters import SharedParameters
from ...stages.stage import Stage
from ...transport.exchange import EndOf, Exchange
from ...transport.remote import Way
from ...transport.stream_ends import StreamIncoming, StreamOutgoing
from ..process_ends import ends_of
from .crossing import Crossing
from .descriptions import Descriptions
from .device_engine import DeviceEngine, DeviceRoute
from .device_step import DeviceStep, NotRun
from .keepalive import Custody
from .layout import StreamLayout
from .nccl import Pair, make_pairs
from .step_signature import Kinds


class DeviceProcessEngine(DeviceEngine):
    """The ``Engine`` of one of the processes that share a pipeline and have a GPU each.

    Each process enqueues its own tasks, sends and receives in the one order of all tasks that the simulated
    step has. So the host of one never waits for a host that waits for it, nor a stream for a stream.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        stages: list[Stage],
        rank_of_stage: Sequence[int],
        exchange_of: Callable[..., Exchange],
        shared: SharedParameters,
        guard: RecomputationGuard,
        processes: Processes,
    ) -> None:
        """``devices``: this process's, for each rank. Raises as ``DeviceEngine`` does."""
        super().__init__(devices, stages, rank_of_stage, exchange_of, shared, guard)
        self._rank = processes.rank
        self._processes = processes
        self._rank_of_first_stage = rank_of_stage[0]
        self._failure = Failure(processes.notices(), processes.everyone)
        descriptions = Descriptions(processes, self._failure)
        self._kinds = Kinds(stages, processes, self._failure, descriptions)
        self._pairs = make_pairs(rank_of_stage, processes, self.devices[0])
        self._waits = _Waits(descriptions, self._pairs)
        self._failure.watch(self._waits)
        self.close = functools.partial(_close, self.close, self._failure, processes)

    @property
    def death(self) -> str:
        return DeviceEngine.death if super().dead else self._failure.describe()

    @property
    def dead(self) -> bool:
        return super().dead or self._failure.is_known

    def agreed(self, count: int | None) -> int:
        return self._processes.agree(count, self._rank_of_first_stage)

    def add_up(self, tensor: Tensor, among: Connections, timeout: float) -> None:
        """As ``ProcessEngine``; by way of the host."""
        total = tensor.cpu()
        work = among.all_reduce(total, seconds(timeout + GRACE))
        self._failure.finish(work, timeout, "processes that hold one of its parameters, too")
        tensor.copy_(total)

    def run(self, route: DeviceRoute, *, timeout: float, record: bool) -> DeviceStep | NotRun:
        try:
            self._kinds.begin(route.plan, route.exchange.step, timeout)
            result = super().run(route, timeout=timeout, record=record)
        except StepTimeout as error:
            result = NotRun("timed out", f"  {error}")
        except PeerError as error:
            result = NotRun("failed", "", error)
        if self._failure.error is None:
            if result.outcome == "timed out" or isinstance(result.error, PeerError):
                self._failure.seek()
        elif result.error is None or isinstance(result.error, PeerError):
            return NotRun("failed", "", self._failure.error)
        return result

    def agreed_kind(self, kind: Hashable | None, timeout: float) -> str | None:
        return self._kinds.agree(kind, timeout)

    def failed(self, reason: str) -> None:
        if self._capturing:
            return  # nothing has run: steps go on without a graph
        self._failure.tell(reason)
        self._waits.fail()

    def _exchange(self, layout: StreamLayout, custody: Custody, end_of: EndOf | None = None) -> Exchange:
        def crossing(way: Way) -> tuple[Crossing, str]:
            letter = "F" if way.what == "activations" else "B"
            boundary = way.receiver - 1 if letter == "F" else way.receiver
            pair = self._pairs[boundary, letter]
            parts = (layout, custody, self._executor, self._of_stage, boundary, letter, pair)
            return Crossing(*parts), f"{boundary}{letter}"

        def outgoing(line: object, way: Way) -> StreamOutgoing:
            ours, name = crossing(way)
            return StreamOutgoing(way, ours, self._kinds.of_way(way, name), self.devices[0])

        def incoming(line: object, way: Way, tasks: object) -> StreamIncoming:
            ours, name = crossing(way)
            return StreamIncoming(way, ours, self._kinds.of_way(way, name))

        end_of = ends_of(layout.plan, self._processes, outgoing, incoming)
        return super()._exchange(layout, custody, end_of)


class _Waits(NamedTuple):
    """What of this process waits for others, on the host and on the GPU."""

    descriptions: Descriptions
    pairs: Mapping[tuple[int, str], Pair]

    def fail(self, error: Exception | None = None) -> None:
        """Ends that."""
        self.descriptions.give_up()
        for pair in self.pairs.values():
            with contextlib.suppress(RuntimeError):  # it has ended already
                pair.abort()


def _close(close: Callable[[], None], failure: Failure, processes: Processes) -> None:
    close()
    failure.close()
    processes.close(idle=not failure.is_known)
