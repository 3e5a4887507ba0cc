"""The routes of a batch through the stages: one for training, one for each microbatch count of ``eval``."""

from typing import Any

from .. import _C
from ..engines.protocol import Bodies, Engine, Route
from ..stages.stage import Stage


class Routes:
    """The routes of one pipeline.

    Attributes:
        train: the route of a training step, along the plan last given to ``follow``.
    """

    train: Route

    def __init__(self, stages: list[Stage], engine: Engine[Any]) -> None:
        self._engine = engine
        self._bodies = engine.bodies(stages)
        self._eval_bodies: Bodies = {(s.index, "F"): s.evaluate for s in stages}
        self._eval: dict[int, Route] = {}

    def follow(self, plan: _C.Plan) -> None:
        """Trains along ``plan`` from now on."""
        self.train = self._engine.route(plan, self._bodies)

    def eval(self, microbatches: int) -> Route:
        """The route of an evaluation: forward only, on the ranks of the training plan."""
        if microbatches not in self._eval:
            trained = self.train.plan
            plan = _C.make_forward_plan(
                trained.rank_of_stage,
                trained.num_ranks,
                microbatches,
                overlap=trained.overlap,
                skips=[_C.Skip(skip.source, skip.target) for skip in trained.skips],
                reactive=trained.reactive,
            )
            self._eval[microbatches] = self._engine.route(plan, self._eval_bodies)
        return self._eval[microbatches]
