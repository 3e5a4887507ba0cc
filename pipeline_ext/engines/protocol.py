"""The interface of engines: ``host`` runs a pipeline's tasks on CPU threads, ``cuda`` on GPU streams."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, TypeVar

from torch import Tensor

from .. import _C
from ..plan.records import StepRecord
from ..processes.connections import Connections
from ..stages.stage import Stage
from ..transport.exchange import Exchange

Body = Callable[[int], None]
Bodies = Mapping[tuple[int, str], Body]  # by stage and kind


class Route(Protocol):
    """A plan, the bodies of its tasks, and its channels."""

    @property
    def plan(self) -> _C.Plan: ...

    @property
    def exchange(self) -> Exchange: ...


class StepResult(StepRecord, Protocol):
    """The result of a step."""

    @property
    def outcome(self) -> str:
        """ "done", "failed", "timed out" or "closed"."""

    @property
    def error(self) -> BaseException | None: ...

    @property
    def failed_task(self) -> int | None: ...

    @property
    def waiting(self) -> str:
        """After a timeout: which tasks wait for what."""


RouteType = TypeVar("RouteType", bound=Route)


class Engine(Protocol[RouteType]):
    """Runs steps, one at a time, until closed."""

    @property
    def dead(self) -> bool:
        """Whether it cannot run any more."""

    @property
    def death(self) -> str:
        """Why it is dead."""

    @property
    def interruption(self) -> Exception | None:
        """Another process's failure, because of which what the last step returned is useless."""

    @property
    def stop(self) -> Callable[[], object]:
        """Ends a running step soon, because the process ends. The function does not keep the model alive."""

    @property
    def close(self) -> Callable[[], object]:
        """Ends a running step and releases threads and devices. The function does not keep the model alive."""

    def bodies(self, stages: list[Stage]) -> Bodies:
        """The functions that the tasks of a training step call."""

    def route(self, plan: _C.Plan, bodies: Bodies) -> RouteType:
        """Prepares to run ``plan``."""

    def arrive(self, value: Any, stage: int) -> Any:
        """Moves the caller's pytree to the device of ``stage``."""

    def wait_for_inputs(self, timeout: float) -> StepResult | None:
        """Waits until the caller may change what ``arrive`` was given; the failure if that does not come."""

    def agreed_count(self, count: int | None) -> int:
        """The microbatches of an evaluation. ``count``: None if another process has the first stage."""

    def agreed_key(self, key: Hashable | None, timeout: float) -> Hashable | None:
        """One key for all processes, made from the ``key`` of each; None if any of them has None."""

    def run(self, route: RouteType, *, timeout: float, record: bool) -> StepResult:
        """Runs a step that has begun. On Ctrl-C, stops the step and raises KeyboardInterrupt."""

    def settle(self, route: RouteType, timeout: float) -> None:
        """Returns once other processes have received what a step sent them, or one has failed.

        Raises StepTimeout if one does not receive it in time.
        """

    def add_up(self, tensor: Tensor, among: Connections, timeout: float) -> None:
        """Makes ``tensor`` the sum of the tensors of the connected processes.

        Raises PeerError if one of them failed, StepTimeout if one does not come in time.
        """

    def failed(self, reason: str) -> None:
        """Tells other processes that a step failed."""

    def give_up(self, stages: list[Stage]) -> None:
        """After a failed step: makes sure that nothing it left behind can touch the model."""
