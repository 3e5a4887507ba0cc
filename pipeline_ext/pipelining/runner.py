"""Runs the steps of one schedule object."""

import contextlib
from typing import Any

from torch import Tensor
from torch.distributed.pipelining.schedules import _PipelineContext

from .. import _C
from ..engines.lifetime import Lifetime
from ..errors import PipelineError
from ..stages.context import CallerContext
from ..stages.wrapped import WrappedStages
from ..step.run import run_step, settle
from .custom_functions import replaced_methods
from .losses import Losses
from .make_engine import make_engine, timeout_of
from .order import action_texts, order_of
from .tasks import Tasks
from .torch_stage import TorchStage
from .torch_step import TorchStep


class Runner:
    """The stages, plan and engine of a schedule, as long as it keeps its order.

    Tasks run in exactly torch's order: stages may run collectives of other groups (tensor parallelism, FSDP),
    whose order must be the same in all processes.

    Holds the schedule during a step only: the schedule holds this object, and is freed with its last reference.
    """

    def __init__(self, schedule: Any, stages: list[Any]) -> None:
        """``schedule`` and ``stages`` are torch's; ``stages`` are those of this process.

        Raises InvalidArgument if the schedules of several processes differ.
        """
        self._losses = Losses()
        self._stages = {stage.stage_index: TorchStage(stage, self._losses) for stage in stages}
        first, count = stages[0], schedule._n_microbatches
        self._wrapped = WrappedStages(list(self._stages.values()), count)
        order = order_of(schedule)
        if order is None:
            homes = [first.stage_index_to_group_rank[s] for s in range(first.num_stages)]
            plan = _C.make_forward_plan(homes, first.group_size, count, reactive=False)
            self._tasks = Tasks(schedule, self._stages, [])
        else:
            plan = _C.plan_of_cells(action_texts(order))
            self._tasks = Tasks(schedule, self._stages, order[first.group_rank])
        self._timeout = timeout_of(first)
        self._engine = make_engine(plan, schedule, first)
        self._lifetime = Lifetime(schedule, self._engine)
        self._train = None if order is None else self._engine.route(plan, self._tasks.bodies())
        forward_plan = _C.make_forward_plan(plan.rank_of_stage, plan.num_ranks, count, reactive=False)
        self._eval = self._engine.route(forward_plan, self._tasks.eval_bodies())

    def close(self) -> None:
        """Ends the engine."""
        self._lifetime.close()

    def run(
        self,
        schedule: Any,
        inputs: list[tuple[tuple, dict[str, Any]]],
        targets: list[Any] | None,
        losses: list[Tensor] | None,
        loss_kwargs: dict[str, Any] | None,
        *,
        weights: list[float],
        keep_outputs: bool,
    ) -> None:
        """Runs one step, or an evaluation if ``schedule`` has no backward. The lists are by microbatch.

        The last stage's ``output_chunks`` get the outputs. Raises as ``Pipeline.step`` does.
        """
        self._lifetime.check()
        trains = schedule._has_backward and self._train is not None
        route = self._train if trains and self._train is not None else self._eval
        caller = CallerContext.of_this_thread()
        arg_mbs, kwarg_mbs = (list(column) for column in zip(*inputs))
        context = _PipelineContext(schedule, arg_mbs, kwarg_mbs, targets, losses)
        with self._lifetime.turn("step was called"), replaced_methods(self._stages, trains):
            step = TorchStep(route.exchange, caller, inputs, weights, keep_outputs)
            self._tasks.begin(context, caller)
            self._losses.begin(schedule, targets, loss_kwargs)
            try:
                with self._wrapped.accumulating() if trains else contextlib.nullcontext():
                    run_step(self._engine, route, list(self._stages.values()), step, timeout=self._timeout)
                # The script may now destroy its process group, or exit.
                settle(self._engine, route, list(self._stages.values()), self._timeout)
            finally:
                self._tasks.end()
                self._losses.end()
        last = self._stages[max(self._stages)].torch_stage
        if last.is_last:
            last.output_chunks = step.outputs if keep_outputs else []
            if trains and not step.has_trained:
                raise PipelineError(
                    "step found nothing to train: no microbatch's loss depends on anything that requires a "
                    "gradient; are all parameters frozen, or is the loss detached?"
                )
        if trains:
            step.backward_into_inputs()
