"""Ranks as native threads of this process: one each, or two with ``overlap``."""

import functools
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from torch import Tensor

from .. import _C
from ..processes.connections import Connections
from ..reduction import GradientReduction
from ..stages.abandoned import lock_out
from ..stages.recomputation import RecomputationGuard
from ..stages.stage import Stage
from ..transport.exchange import Exchange
from .parts import EngineParts
from .protocol import Bodies, Body

_STOP_WAIT = 1.0  # seconds that a stage's code has to return when the process ends


class HostRoute(NamedTuple):
    """A plan, the bodies of its tasks, and its channels."""

    plan: _C.Plan
    program: _C.Program
    exchange: Exchange


class HostEngine:
    """The ``Engine`` of the CPU."""

    def __init__(self, parts: EngineParts, rank: int | None = None, follows: bool = False) -> None:
        """``rank``: the only one to run; None: all. Later plans must have as many workers as ``parts.plan``.

        ``follows``: the rank's tasks run in the order in which another process takes them.
        """
        threads = _thread_names(parts.plan, rank)
        modules = [stage.module for stage in parts.stages]
        self._executor = _C.HostExecutor(threads, rank, follows)
        self._guard = RecomputationGuard(modules, overlap=parts.plan.overlap)
        self._exchange_of = parts.exchange_of
        self._shared = parts.shared
        assert parts.reduction is None or isinstance(parts.reduction, GradientReduction)
        self._reduction = parts.reduction
        self._wrapped = parts.wrapped
        self.stop: Callable[[], object] = functools.partial(self._executor.close, _STOP_WAIT)
        self.close: Callable[[], object] = functools.partial(
            _close, self._executor, self._guard, self._reduction
        )

    @property
    def interruption(self) -> Exception | None:
        return None  # no other process is in it

    @property
    def dead(self) -> bool:
        return self._executor.dead

    @property
    def death(self) -> str:
        return "a stage's code never returned"

    def bodies(self, stages: list[Stage]) -> Bodies:
        bodies: dict[tuple[int, str], Body] = {}
        for stage in stages:
            backward = self._wrapped.watch(stage.index, self._guard.watch(stage.backward))
            weight_gradient = self._wrapped.watch(stage.index, self._guard.watch(stage.weight_gradient))
            if self._reduction is not None:
                backward = self._reduction.watch(stage.index, backward)
                weight_gradient = self._reduction.watch(stage.index, weight_gradient)
            bodies[stage.index, "F"] = self._shared.watch(stage.index, stage.forward)
            bodies[stage.index, "B"] = backward
            bodies[stage.index, "I"] = self._guard.watch(stage.input_gradient)
            bodies[stage.index, "W"] = weight_gradient
        return bodies

    def route(self, plan: _C.Plan, bodies: Bodies) -> HostRoute:
        return HostRoute(plan, _C.Program(plan, dict(bodies)), self._exchange_of(plan))

    def agreed_count(self, count: int | None) -> int:
        assert count is not None  # the first stage is here
        return count

    def agreed_key(self, key: Hashable | None, timeout: float) -> Hashable | None:
        return key

    def arrive(self, value: Any, stage: int) -> Any:
        return value

    def wait_for_inputs(self, timeout: float) -> None:
        pass  # they are the caller's own, and the step has ended

    def run(self, route: HostRoute, *, timeout: float, record: bool) -> _C.StepResult:
        return self._executor.run(route.program, timeout=timeout, record=record)

    def settle(self, route: HostRoute, timeout: float) -> None:
        pass  # nothing was sent to another process

    def add_up(self, tensor: Tensor, among: Connections, timeout: float) -> None:
        pass  # the sum of one process's tensor is that tensor

    def failed(self, reason: str) -> None:
        pass

    def give_up(self, stages: list[Stage]) -> None:
        if not self._executor.dead:
            return
        self._shared.give_up()
        threads = (stage.thread for stage in stages if stage.thread is not None)
        lock_out(threads, [p for stage in stages for p in stage.parameters()])


def _close(executor: _C.HostExecutor, guard: RecomputationGuard, reduction: GradientReduction | None) -> None:
    executor.close()
    guard.remove()
    if reduction is not None:
        reduction.close()


def _thread_names(plan: _C.Plan, rank: int | None) -> list[str]:
    ranks = range(plan.num_ranks) if rank is None else (rank,)
    if not plan.overlap:
        return [f"pe rank {rank}" for rank in ranks]
    return [f"pe rank {rank} {direction}" for rank in ranks for direction in ("F", "B")]
