"""What runs a pipeline's tasks: threads of the CPU (``host``), or the streams of GPUs (``cuda``)."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from .. import _C
from ..plan.records import StepRecord
from ..stages.stage import Stage
from ..transport.exchange import Exchange

Body = Callable[[int], None]
Bodies = Mapping[tuple[int, str], Body]  # by stage and kind


class Route(Protocol):
    """A plan's tasks with what they do, and its channels."""

    plan: _C.Plan
    exchange: Exchange


class StepResult(StepRecord, Protocol):
    """What became of a step."""

    outcome: str  # "done", "failed", "timed out", "closed"
    error: BaseException | None
    failed_task: int | None
    waiting: str  # of a step that timed out: who waits for what


class Engine(Protocol):
    """Runs steps, one at a time, until closed.

    Attributes:
        dead: whether it cannot run any more; ``death`` says why.
        stop: ends a step that runs.
        close: does that, and lets go of threads and devices. Neither refers to the model.
    """

    dead: bool
    death: str
    stop: Callable[[], None]
    close: Callable[[], None]

    def bodies(self, stages: list[Stage]) -> Bodies:
        """What a training step calls."""

    def route(self, plan: _C.Plan, bodies: Bodies) -> Route:
        """Prepares to run ``plan``."""

    def arrive(self, value: Any, stage: int) -> Any:
        """A pytree of the caller's, where ``stage`` can use it."""

    def agreed(self, count: int | None) -> int:
        """Microbatches of an evaluation. ``count``: None where another process has the first stage."""

    def run(self, route: Route, *, timeout: float, record: bool) -> StepResult:
        """Runs a step that has begun. Raises what Ctrl-C raises, having stopped it."""

    def failed(self, reason: str) -> None:
        """A step has failed."""

    def give_up(self, stages: list[Stage]) -> None:
        """Sees to it that what a failed step has left behind cannot touch the model."""
