"""Ranks as processes, each with a GPU: NCCL carries messages between their streams. Not yet run on GPUs."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ...errors import InvalidArgument, PeerError, PipelineError, StepTimeout
from ...processes.connections import Connections
from ...processes.failure import GRACE, Failure
from ...processes.group import Processes, seconds
from ...reduction.replica_reduction import ReplicaReduction
from ...stages.step import Step
from ...transport.exchange import Exchange
from ...transport.flow import Flow
from ...transport.make_channels import RemoteChannelOf
from ...transport.stream_remote import StreamReceiver, StreamSender
from ..parts import EngineParts
from ..remote_channels import remote_channels
from .crossing import Crossing
from .descriptions import Descriptions
from .device_engine import DeviceEngine, DeviceRoute
from .device_step import DeviceStep, NotRun
from .keepalive import KeepAlive
from .layout import StreamLayout
from .nccl import Pair, Sums, make_pairs, make_sums
from .replicas import DeviceReduction
from .step_signature import StepSignatures


class DeviceProcessEngine(DeviceEngine):
    """The ``Engine`` of one of the processes that share a pipeline and have a GPU each.

    Each process enqueues its own tasks, sends and receives in the order of the simulated step, which is the
    same in all processes. So no two hosts, and no two streams, wait for each other.
    """

    def __init__(
        self,
        parts: EngineParts,
        processes: Processes,
    ) -> None:
        """``parts.devices`` has this process's device for each rank.

        Raises as ``DeviceEngine`` does, and InvalidArgument for skip connections.
        """
        if parts.plan.skips:
            raise InvalidArgument(
                "skip connections between the GPUs of several processes are refused: only neighbors have "
                "connections of NCCL; pass the skipped tensor on as a part of each stage's result, cut the "
                "model so that each skip lies in one stage, run all ranks in one process, or give "
                'devices=["cpu"]'
            )
        super().__init__(parts, processes.rank)
        self._processes = processes
        self._rank_of_first_stage = parts.plan.rank_of_stage[0]
        self._failure = Failure(processes.notices(), processes.informed)
        descriptions = Descriptions(processes, self._failure)
        self._signatures = StepSignatures(parts.stages, processes, self._failure, descriptions)
        try:
            self._pairs = make_pairs(parts.plan.rank_of_stage, processes, self.devices[0])
            sums = make_sums(processes, self.devices[0])
        except BaseException:
            self.close()
            raise
        if sums is not None:
            assert isinstance(parts.reduction, DeviceReduction)
            parts.reduction.use(sums)
        carriers: list[Pair | Sums] = [*self._pairs.values()]
        if sums is not None:
            carriers.append(sums)
        self._waits = _Waits(descriptions, carriers)
        self._failure.watch(self._waits)
        self.close = functools.partial(_close, self.close, self._failure, processes, parts.reduction)

    @property
    def interruption(self) -> Exception | None:
        return self._failure.error

    @property
    def death(self) -> str:
        return super().death if super().dead else self._failure.describe()

    @property
    def dead(self) -> bool:
        return super().dead or self._failure.is_known

    def agreed_count(self, count: int | None) -> int:
        try:
            return self._processes.agree(count, self._rank_of_first_stage, self._failure.finish)
        except PipelineError as error:
            self.failed(str(error))
            raise

    def add_up(self, tensor: Tensor, among: Connections, timeout: float) -> None:
        total = tensor.cpu()
        work = among.all_reduce(total, seconds(timeout + GRACE))
        self._failure.finish(work, timeout, among.others)
        tensor.copy_(total)

    def run(self, route: DeviceRoute, *, timeout: float, record: bool) -> DeviceStep | NotRun:
        try:
            step = route.exchange.step
            assert isinstance(step, Step)  # an exchange knows it as a ``StepData``
            self._signatures.begin(route.plan, step, timeout)
            result = super().run(route, timeout=timeout, record=record)
        except StepTimeout as error:
            result = NotRun("timed out", f"  {error}")
        except PeerError as error:
            result = NotRun("failed", "", error)
        return self._blamed(result) or result

    def wait_for_inputs(self, timeout: float) -> NotRun | None:
        # A GPU that waits for a process that has gone reads no inputs.
        result = super().wait_for_inputs(timeout)
        return None if result is None else self._blamed(result) or result

    def _blamed(self, result: DeviceStep | NotRun) -> NotRun | None:
        """The failure of another process, if that explains the result; looks for who is silent, if it may."""
        if self._failure.error is None:
            if result.outcome == "timed out" or isinstance(result.error, PeerError):
                self._failure.seek()
        elif result.error is None or isinstance(result.error, PeerError):
            return NotRun("failed", "", self._failure.error)
        return None

    def agreed_key(self, key: Hashable | None, timeout: float) -> str | None:
        return self._signatures.agree(key, timeout)

    def failed(self, reason: str) -> None:
        if self._capturing:
            return  # nothing has run: steps go on without a graph
        self._failure.tell(f"{reason}{self._failure.silence}")
        self._waits.fail()

    def _exchange(
        self, layout: StreamLayout, keepalive: KeepAlive, remote_channel_of: RemoteChannelOf | None = None
    ) -> Exchange:
        def crossing(flow: Flow) -> tuple[Crossing, str]:
            letter = "F" if flow.what == "activations" else "B"
            boundary = flow.receiver - 1 if letter == "F" else flow.receiver
            pair = self._pairs[boundary, letter]
            ends = (boundary, boundary + 1) if letter == "F" else (boundary + 1, boundary)
            parts = (layout, keepalive, self._executor, self._of_stage, *ends, pair)
            return Crossing(*parts), f"{boundary}{letter}"

        def sender(peer: object, flow: Flow) -> StreamSender:
            ours, name = crossing(flow)
            return StreamSender(flow, ours, self._signatures.of_flow(flow, name), self.devices[0])

        def receiver(peer: object, flow: Flow, tasks: object) -> StreamReceiver:
            ours, name = crossing(flow)
            return StreamReceiver(flow, ours, self._signatures.of_flow(flow, name))

        remote_channel_of = remote_channels(layout.plan, self._processes, sender, receiver)
        return super()._exchange(layout, keepalive, remote_channel_of)


class _Waits(NamedTuple):
    """This process's waits for others, on the host and on the GPU."""

    descriptions: Descriptions
    carriers: Sequence[Pair | Sums]

    def fail(self, error: Exception | None = None) -> None:
        """Ends them."""
        self.descriptions.give_up()
        for carrier in self.carriers:
            with contextlib.suppress(RuntimeError):  # it has ended already
                carrier.abort()


def _close(
    close: Callable[[], object],
    failure: Failure,
    processes: Processes,
    reduction: ReplicaReduction[Any] | None,
) -> None:
    close()
    if reduction is not None:
        reduction.close()
    failure.close()
    processes.close(idle=not failure.is_known)
