"""Ranks as native threads of this process: one each, or with ``overlap`` two."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import _C
from ..reduction import GradientReduction
from ..stages.abandoned import lock_out
from ..stages.recomputation import RecomputationGuard
from ..stages.shared_parameters import SharedParameters
from ..stages.stage import Stage
from ..stages.wrapped import WrappedStages
from ..transport.exchange import Exchange
from .protocol import Bodies


class HostRoute(NamedTuple):
    """A plan's tasks with what they do, and its channels."""

    plan: _C.Plan
    program: _C.Program
    exchange: Exchange


class HostEngine:
    """The ``Engine`` of the CPU."""

    death = "a stage's code never returned"

    def __init__(
        self,
        plan: _C.Plan,
        exchange_of: Callable[..., Exchange],
        shared: SharedParameters,
        guard: RecomputationGuard,
        reduction: GradientReduction | None,
        wrapped: WrappedStages,
        rank: int | None = None,
    ) -> None:
        """Every plan to come has as many workers as ``plan``. ``rank``: of the plan; None: all."""
        self._executor = _C.HostExecutor(_thread_names(plan, rank), rank)
        self.stop = self._executor.close
        self.close = functools.partial(_close, self._executor, guard, reduction)
        self._exchange_of = exchange_of
        self._shared = shared
        self._guard = guard
        self._reduction = reduction
        self._wrapped = wrapped

    @property
    def dead(self) -> bool:
        return self._executor.dead

    def bodies(self, stages: list[Stage]) -> Bodies:
        bodies = {}
        for stage in stages:
            backward = self._wrapped.watch(stage.index, self._guard.watch(stage.backward))
            weight_gradient = self._wrapped.watch(stage.index, self._guard.watch(stage.weight_gradient))
            if self._reduction is not None:
                backward = self._reduction.watch(stage.index, backward)
                weight_gradient = self._reduction.watch(stage.index, weight_gradient)
            bodies[stage.index, "F"] = self._shared.watch(stage.index, stage.forward)
            bodies[stage.index, "B"] = backward
            input_gradient = functools.partial(stage.input_gradient, tied=self._shared.parameters)
            bodies[stage.index, "I"] = self._guard.watch(input_gradient)
            bodies[stage.index, "W"] = weight_gradient
        return bodies

    def route(self, plan: _C.Plan, bodies: Bodies) -> HostRoute:
        return HostRoute(plan, _C.Program(plan, dict(bodies)), self._exchange_of(plan))

    def agreed(self, count: int | None) -> int:
        return count

    def arrive(self, value: Any, stage: int) -> Any:
        return value

    def run(self, route: HostRoute, *, timeout: float, record: bool) -> _C.StepResult:
        return self._executor.run(route.program, timeout=timeout, record=record)

    def settle(self, route: HostRoute) -> None:
        """Returns when other processes have what a step has sent them, or one has failed."""

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
    return [f"pe rank {rank} {way}" for rank in ranks for way in ("F", "B")]
