"""What a batch takes through the stages: what runs, and what carries the results."""

from collections.abc import Callable
from typing import NamedTuple

from . import _C
from .stage import Stage
from .transport.exchange import Exchange

Body = Callable[[int], None]


class Route(NamedTuple):
    """A plan's tasks with what they do, and its channels."""

    program: _C.Program
    exchange: Exchange


class Routes:
    """The routes of one pipeline.

    Attributes:
        train: of a training step, along the plan of the last ``follow``.
    """

    train: Route

    def __init__(
        self,
        stages: list[Stage],
        bodies: dict[tuple[int, str], Body],
        exchange_of: Callable[[_C.Plan], Exchange],
    ) -> None:
        """``bodies``: what trains, by stage and kind."""
        self._bodies = bodies
        self._eval_bodies: dict[tuple[int, str], Body] = {(s.index, "F"): s.evaluate for s in stages}
        self._exchange_of = exchange_of
        self._eval: dict[int, Route] = {}

    def follow(self, plan: _C.Plan) -> None:
        """Trains along ``plan`` from now on."""
        self.train = Route(_C.Program(plan, self._bodies), self._exchange_of(plan))

    def eval(self, microbatches: int) -> Route:
        """Forward alone, over the ranks of the training plan."""
        if microbatches not in self._eval:
            trained = self.train.program.plan
            plan = _C.make_forward_plan(
                trained.rank_of_stage, trained.num_ranks, microbatches, overlap=trained.overlap
            )
            self._eval[microbatches] = Route(
                _C.Program(plan, self._eval_bodies), self._exchange_of(plan)
            )
        return self._eval[microbatches]
