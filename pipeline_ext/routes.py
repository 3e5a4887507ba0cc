"""The ways a batch takes through the stages: one for training, one for each size of an evaluation."""

from . import _C
from .engine import Bodies, Engine, Route
from .stage import Stage


class Routes:
    """The routes of one pipeline.

    Attributes:
        train: of a training step, along the plan of the last ``follow``.
    """

    train: Route

    def __init__(self, stages: list[Stage], engine: Engine) -> None:
        self._engine = engine
        self._bodies = engine.bodies(stages)
        self._eval_bodies: Bodies = {(s.index, "F"): s.evaluate for s in stages}
        self._eval: dict[int, Route] = {}

    def follow(self, plan: _C.Plan) -> None:
        """Trains along ``plan`` from now on."""
        self.train = self._engine.route(plan, self._bodies)

    def eval(self, microbatches: int) -> Route:
        """Forward alone, over the ranks of the training plan."""
        if microbatches not in self._eval:
            plan = forward_plan(self.train.plan, microbatches)
            self._eval[microbatches] = self._engine.route(plan, self._eval_bodies)
        return self._eval[microbatches]


def forward_plan(trained: _C.Plan, microbatches: int) -> _C.Plan:
    """That of an evaluation: every F, on the ranks where ``trained`` has them.

    Where that keeps one order, so does this: a rank takes its stages in turn, for some microbatches each.
    """
    homes = trained.rank_of_stage
    skips = [_C.Skip(skip.source, skip.target) for skip in trained.skips]
    if trained.reactive:
        return _C.make_forward_plan(
            homes, trained.num_ranks, microbatches, overlap=trained.overlap, skips=skips
        )
    rows: list[list[str]] = [[] for _ in range(trained.num_ranks)]
    # So few that all find room on their way round the ranks, and enough to keep these busy.
    for first in range(0, microbatches, trained.num_ranks):
        some = range(first, min(first + trained.num_ranks, microbatches))
        for stage, rank in enumerate(homes):
            rows[rank] += [f"{stage}F{m}" for m in some]
    return _C.plan_of_cells(rows, overlap=trained.overlap, skips=skips)
