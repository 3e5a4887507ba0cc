"""Ranks as streams of CUDA devices: the caller's thread enqueues whole steps and waits for nothing in them."""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ... import _C
from ...stages.recomputation import RecomputationGuard
from ...stages.shared_parameters import SharedParameters
from ...stages.stage import Stage
from ...transport.exchange import EndOf, Exchange
from ..protocol import Bodies, Body
from . import torch_side
from .device_copy import Passage
from .device_step import DeviceStep, NotRun
from .keepalive import Custody
from .layout import StreamLayout
from .parameters import LaneParameters


class DeviceRoute(NamedTuple):
    """A plan's tasks on their streams, and its channels."""

    plan: _C.Plan
    exchange: Exchange
    layout: StreamLayout
    custody: Custody
    program: _C.LaidProgram


class DeviceEngine:
    """The ``Engine`` of CUDA devices, any number of ranks on each.

    Attributes:
        devices: of the ranks.
    """

    death = "a GPU has failed, and with it all that this process does there"
    _rank: int | None = None  # of this process, where each rank is one

    def __init__(
        self,
        devices: Sequence[torch.device],
        stages: list[Stage],
        rank_of_stage: Sequence[int],
        exchange_of: Callable[..., Exchange],
        shared: SharedParameters,
        guard: RecomputationGuard,
    ) -> None:
        """Raises DeviceError where the driver or a device cannot be used."""
        self.devices = list(devices)
        self._of_stage = [devices[rank] for rank in rank_of_stage]
        self._executor = _C.StreamExecutor([device.index for device in devices])
        self._exchange_of = exchange_of
        self._parameters = LaneParameters(stages, shared.target)
        self._guard = guard
        self._capturing = False
        self.stop = self._executor.close
        self.close = functools.partial(_close, self._executor, guard)

    @property
    def dead(self) -> bool:
        return self._executor.dead

    def bodies(self, stages: list[Stage]) -> Bodies:
        bodies = {}
        for stage in stages:
            bodies[stage.index, "F"] = stage.forward
            bodies[stage.index, "B"] = self._guard.watch(stage.backward)
            bodies[stage.index, "I"] = self._guard.watch(stage.input_gradient)
            bodies[stage.index, "W"] = self._guard.watch(stage.weight_gradient)
        return bodies

    def route(self, plan: _C.Plan, bodies: Bodies) -> DeviceRoute:
        layout = StreamLayout(plan, [device.index for device in self.devices], self._rank)
        custody = Custody(layout)
        exchange = self._exchange(layout, custody)
        carrying: dict[tuple[int, str], Body] = {}
        for stage in range(plan.num_stages):
            carrying[stage, "SEND_F"] = functools.partial(exchange.carry_value, stage)
            carrying[stage, "SEND_B"] = functools.partial(exchange.carry_gradients, stage)
        streams: list[Any] = []
        enqueued = {
            (stage, kind): self._enqueueing(layout, custody, streams, stage, kind, body)
            for (stage, kind), body in {**bodies, **carrying}.items()
        }
        program = self._executor.lay_out(_C.Program(plan, enqueued), layout.streams)
        streams += map(torch_side.stream, program.streams, layout.streams.devices)
        return DeviceRoute(plan, exchange, layout, custody, program)

    def agreed(self, count: int | None) -> int:
        return count

    def failed(self, reason: str) -> None:
        pass

    def agreed_kind(self, kind: Hashable | None, timeout: float) -> Hashable | None:
        """What all processes together see a step as, of what this one sees; None where one sees None."""
        return kind

    def arrive(self, value: Any, stage: int) -> Any:
        return torch_side.move(value, self._of_stage[stage])

    def wait_for_room(self, timeout: float) -> NotRun | None:
        """Lets the devices end all steps but the last; says so if they do not."""
        outcome = self._executor.wait_for_room(timeout=timeout)
        if outcome == "done":
            return None
        return NotRun(outcome, "  a GPU has not ended the step before the last one")

    def mark(self) -> None:
        """What the caller has enqueued so far is a step."""
        self._executor.mark(torch_side.callers(self._executor.devices))

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Within it steps are captured, not run."""
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    def run(self, route: DeviceRoute, *, timeout: float, record: bool) -> DeviceStep | NotRun:
        """Enqueues a step. The caller's current streams then follow it."""
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
                # In the thread that calls it a backward begins at once.
                torch.autograd.set_multithreading_enabled(False),
            ):
                result = self._executor.run(
                    route.program, callers=callers, record=record, capturing=self._capturing
                )
        finally:
            route.custody.end()
            self._parameters.end()
        if result.outcome != "done":
            self._parameters.forget()
        return DeviceStep(route.layout, result, self._executor.idle)

    def give_up(self, stages: list[Stage]) -> None:
        pass  # no thread of ours is left in a stage

    def _exchange(self, layout: StreamLayout, custody: Custody, end_of: EndOf | None = None) -> Exchange:
        """Between the stages of a plan."""
        passage_of = functools.partial(Passage, layout, custody, self._executor, self._of_stage)
        return self._exchange_of(layout.plan, passage_of=passage_of, end_of=end_of)

    def _enqueueing(
        self,
        layout: StreamLayout,
        custody: Custody,
        streams: list[Any],
        stage: int,
        kind: str,
        body: Body,
    ) -> Body:
        """``body`` on its stream."""
        parameters = self._parameters
        adds = kind in ("B", "W")

        def run(m: int) -> None:
            step, stream = layout.place(kind, stage, m)
            torch_side.use(streams[stream])
            custody.let_go(step)
            body(m)

        def train(m: int) -> None:
            step, lane = layout.place(kind, stage, m)
            torch_side.use(streams[lane])
            custody.let_go(step)
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


def _with_range(enqueue: Body, plan: _C.Plan, stage: int, kind: str) -> Body:
    """Shown in a profiler: kind, stage and microbatch, and how many results leave with this one."""
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
    """What the caller has entered; forwards enter it again, without its cache of weights."""
    stack = contextlib.ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def _close(executor: _C.StreamExecutor, guard: RecomputationGuard) -> None:
    executor.close()
    guard.remove()
