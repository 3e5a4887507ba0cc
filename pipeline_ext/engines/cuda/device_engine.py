"""Ranks as streams of CUDA devices: the caller's thread enqueues whole steps and never waits inside one."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from ...errors import DeviceError, InvalidArgument
from ...processes.connections import Connections
from ...stages.recomputation import RecomputationGuard
from ...stages.stage import Stage
from ...transport.exchange import Exchange
from ...transport.make_channels import RemoteChannelOf
from ..parts import EngineParts
from ..protocol import Bodies, Body
from . import torch_side
from .device_copy import DeviceCopy
from .device_step import DeviceStep, NotRun
from .keepalive import KeepAlive
from .layout import StreamLayout
from .parameters import LaneParameters


class DeviceRoute(NamedTuple):
    """A plan, its tasks laid out on streams, and its channels."""

    plan: _C.Plan
    exchange: Exchange
    layout: StreamLayout
    keepalive: KeepAlive
    program: _C.LaidProgram


class DeviceEngine:
    """The ``Engine`` of CUDA devices, any number of ranks on each.

    Attributes:
        devices: one for each rank.
        averages: whether gradients are averaged over replicas.
    """

    def __init__(self, parts: EngineParts, rank: int | None = None) -> None:
        """``rank``: the only one to run; None: all.

        Raises DeviceError if the driver or a device cannot be used.
        """
        torch_side.warn_of_few_queues()
        self.devices = list(parts.devices)
        self.averages = parts.reduction is not None
        self._rank = rank
        self._of_stage = [self.devices[rank] for rank in parts.plan.rank_of_stage]
        self._executor = _C.StreamExecutor([device.index for device in self.devices])
        self._exchange_of = parts.exchange_of
        self._parameters = LaneParameters(parts.stages, parts.shared.target, self._of_stage)
        modules = [stage.module for stage in parts.stages]
        # One thread enqueues everything, so random numbers are drawn in the plan's order.
        self._guard = RecomputationGuard(modules, overlap=parts.plan.overlap)
        self._capturing = False
        self._non_blocking = parts.non_blocking
        self.stop: Callable[[], object] = self._executor.close
        self.close: Callable[[], object] = functools.partial(_close, self._executor, self._guard)

    @property
    def interruption(self) -> Exception | None:
        return None  # no other process is in it

    @property
    def dead(self) -> bool:
        return self._executor.dead

    @property
    def death(self) -> str:
        return "a GPU has failed, and this process can no longer use it"

    def bodies(self, stages: list[Stage]) -> Bodies:
        bodies: dict[tuple[int, str], Body] = {}
        for stage in stages:
            bodies[stage.index, "F"] = stage.forward
            bodies[stage.index, "B"] = self._guard.watch(stage.backward)
            bodies[stage.index, "I"] = self._guard.watch(stage.input_gradient)
            bodies[stage.index, "W"] = self._guard.watch(stage.weight_gradient)
        return bodies

    def route(self, plan: _C.Plan, bodies: Bodies) -> DeviceRoute:
        layout = StreamLayout(plan, [device.index for device in self.devices], self._rank)
        keepalive = KeepAlive(layout)
        exchange = self._exchange(layout, keepalive)
        carrying: dict[tuple[int, str], Body] = {}
        for stage in range(plan.num_stages):
            carrying[stage, "SEND_F"] = functools.partial(exchange.transfer_value, stage)
            carrying[stage, "SEND_B"] = functools.partial(exchange.transfer_gradients, stage)
        streams: list[Any] = []
        enqueued = {
            (stage, kind): self._enqueueing(layout, keepalive, streams, stage, kind, body)
            for (stage, kind), body in {**bodies, **carrying}.items()
        }
        program = self._executor.lay_out(_C.Program(plan, enqueued), layout.streams)
        streams += map(torch_side.stream, program.streams, layout.streams.devices)
        return DeviceRoute(plan, exchange, layout, keepalive, program)

    def agreed_count(self, count: int | None) -> int:
        assert count is not None  # the first stage is here
        return count

    def agreed_key(self, key: Hashable | None, timeout: float) -> Hashable | None:
        return key

    def settle(self, route: DeviceRoute, timeout: float) -> None:
        pass  # nothing was sent to another process

    def add_up(self, tensor: Tensor, among: Connections, timeout: float) -> None:
        pass  # the sum of one process's tensor is that tensor

    def failed(self, reason: str) -> None:
        pass

    def arrive(self, value: Any, stage: int) -> Any:
        self._check_no_capture()
        device = self._of_stage[stage]
        try:
            moved = torch_side.move(value, device)
        except RuntimeError as error:
            if torch_side.is_of_capture(error):
                raise DeviceError(f"nothing was run: {_refused_by_capture(error)}") from error
            raise
        # Whether CUDA stages pageable memory before the copy's call returns depends on the machine.
        if not self._non_blocking and torch_side.on_host(value):
            (caller,) = torch_side.callers([device.index])
            self._executor.mark_inputs(device=device.index, caller=caller)
        return moved

    def wait_for_inputs(self, timeout: float) -> NotRun | None:
        outcome = self._executor.wait_for_inputs(timeout=timeout)
        if outcome == "done":
            return None
        return NotRun(outcome, "  a GPU has not read the inputs; it has not ended the step before")

    def wait_for_room(self, timeout: float) -> NotRun | None:
        """Waits until the devices have ended all steps but the last; returns NotRun if they do not."""
        self._check_no_capture()
        outcome = self._executor.wait_for_room(timeout=timeout)
        if outcome == "done":
            return None
        return NotRun(outcome, "  a GPU has not ended the step before the last one")

    def mark(self) -> None:
        """Marks what the caller has enqueued so far as a step."""
        self._executor.mark(torch_side.callers(self._executor.devices))

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside it, steps are captured, not run."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def run(self, route: DeviceRoute, *, timeout: float, record: bool) -> DeviceStep | NotRun:
        """Enqueues a step. The caller's current streams then wait for its end."""
        if not self._capturing:
            full = self.wait_for_room(timeout)
            if full is not None:
                return full
        if route.plan.has_backward:
            self._parameters.begin()
        callers = torch_side.callers(self._executor.devices)
        try:
            with (
                torch_side.restored(self._executor.devices),
                _without_autocast(),
                # A backward then runs in the thread that calls it, where it begins at once.
                torch.autograd.set_multithreading_enabled(False),
            ):
                result = self._executor.run(
                    route.program, callers=callers, record=record, capturing=self._capturing
                )
        finally:
            route.keepalive.end()
            self._parameters.end()
        if result.outcome != "done":
            self._parameters.forget()
        step = functools.partial(DeviceStep, route.layout, result, self._executor.idle)
        return step() if self._capturing else _explained(step())  # no local: the error refers to this frame

    def give_up(self, stages: list[Stage]) -> None:
        pass  # no thread of ours is left in a stage

    def _check_no_capture(self) -> None:
        if torch_side.is_capturing(self._executor.devices):
            raise InvalidArgument(
                "a CUDA graph of the caller's is being captured, and a step cannot be a part of it; give "
                "graphs=True to Pipeline, which captures whole steps itself, and call step and eval outside of "
                "torch.cuda.graph"
            )

    def _exchange(
        self, layout: StreamLayout, keepalive: KeepAlive, remote_channel_of: RemoteChannelOf | None = None
    ) -> Exchange:
        """The channels between the stages of a plan."""
        stream_memory_of = functools.partial(DeviceCopy, layout, keepalive, self._executor, self._of_stage)
        return self._exchange_of(
            layout.plan, stream_memory_of=stream_memory_of, remote_channel_of=remote_channel_of
        )

    def _enqueueing(
        self,
        layout: StreamLayout,
        keepalive: KeepAlive,
        streams: list[Any],
        stage: int,
        kind: str,
        body: Body,
    ) -> Body:
        """Wraps ``body``, so that it runs with its stream current."""
        parameters = self._parameters
        adds = kind in ("B", "W")

        def run(m: int) -> None:
            op, stream = layout.position(kind, stage, m)
            torch_side.use(streams[stream])
            keepalive.release(op)
            body(m)

        def train(m: int) -> None:
            op, lane = layout.position(kind, stage, m)
            torch_side.use(streams[lane])
            keepalive.release(op)
            parameters.enter(stage, lane)
            try:
                if adds:
                    parameters.before_backward(stage, lane)
                body(m)
            finally:
                parameters.leave(stage)
            if adds:
                parameters.after_backward(stage, lane)

        trains = layout.plan.has_backward and kind in ("F", "B", "I", "W")
        enqueue = train if trains else run
        return _with_range(enqueue, layout.plan, stage, kind) if torch_side.a_profiler_listens() else enqueue


def _explained(step: DeviceStep) -> DeviceStep:
    if torch_side.is_of_capture(step.error):
        refused = DeviceError(_refused_by_capture(step.error))
        refused.__cause__, step.error = step.error, refused
    return step


def _refused_by_capture(error: BaseException | None) -> str:
    """What to do about an error of torch's by which CUDA refused a call during a capture."""
    said = str(error).partition("\n")[0]
    return (
        f"{said}: a CUDA graph is captured in another thread, or by a stage; give capture_error_mode="
        '"thread_local" to torch.cuda.graph there, or capture while no step runs'
    )


def _with_range(enqueue: Body, plan: _C.Plan, stage: int, kind: str) -> Body:
    """Shows the task in a profiler: kind, stage, microbatch, and how many results leave with this one."""
    packs = plan.packs_forward[stage:] if kind in ("F", "SEND_F") else plan.packs[max(stage - 1, 0) : stage]
    pack = packs[0] if packs and kind != "W" else 1

    def run(m: int) -> None:
        ends_group = pack > 1 and ((m + 1) % pack == 0 or m + 1 == plan.num_microbatches)
        message = f", message of {m % pack + 1}" if ends_group else ""
        torch_side.push_range(f"{kind} stage {stage} microbatch {m}{message}")
        try:
            enqueue(m)
        finally:
            torch_side.pop_range()

    return run


def _without_autocast() -> contextlib.AbstractContextManager:
    """Turns off the caller's autocast. Forwards enter it again, without its weight cache."""
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _close(executor: _C.StreamExecutor, guard: RecomputationGuard) -> None:
    executor.close()
    guard.remove()
