"""Searches for the best plan over schedules, placements, orders, microbatch counts and in-flight limits."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .. import _C
from ..base import arguments
from ..errors import InvalidArgument, InvalidSchedule
from . import zero_bubble
from .build import build_plan, check_size
from .costs import Costs, check_factors, rebatched, recut
from .simulation import Simulation, simulate

_WIDER = (1.25, 1.5, 2.0)  # times the in-flight limit of a rule
_MOST_PLACED = 1e15  # more than a search ever places
_FIRST_LOOK = 2_000_000  # tasks placed in the first search for an order, whose speed divides the time


@dataclass(frozen=True)
class Candidate:
    """A plan that can run.

    Attributes:
        schedule: its name; ``"zb-auto"`` for an order that a search found.
        chunks: stages on each rank.
        microbatches: microbatches of the step.
        in_flight: the most microbatches that each stage may hold; None: the schedule's own limit.
        plan: the plan itself.
        simulation: the simulated step.
    """

    schedule: str
    chunks: int
    microbatches: int
    in_flight: list[int] | None
    plan: _C.Plan
    simulation: Simulation


@dataclass(frozen=True)
class Tried:
    """The outcome of one trial.

    Attributes:
        what: the name of the schedule, and how the plan differs from it.
        chunks, microbatches: of the plan.
        makespan: of the simulated step; None if the plan cannot run.
        reason: why it cannot run.
    """

    what: str
    chunks: int
    microbatches: int
    makespan: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        best: the plan whose simulated step is shortest.
        tried: the outcome of each trial, in order.
        lower_bound: no plan with these placements and microbatch counts has a shorter step.
        simulations: number of steps simulated, orders included.
        seconds: time that the search took.
        interrupted: whether Ctrl-C ended it.
    """

    best: Candidate
    tried: list[Tried]
    lower_bound: float
    simulations: int
    seconds: float
    interrupted: bool


def search(
    costs: Costs,
    *,
    num_ranks: int,
    microbatches: int | Sequence[int],
    chunks: Sequence[int] = (1, 2),
    schedules: Sequence[str] | None = None,
    budget: float | None = None,
    trials: int | None = None,
    seed: int = 0,
    on_progress: Callable[[Tried], None] | None = None,
) -> SearchResult:
    """Finds the plan whose simulated step is shortest within ``costs.memory_limit``.

    Tries the named schedules, with their own in-flight limits and with larger ones. Then searches for an order
    for each placement (``pipeline_ext.plan.zero_bubble``) until the budget is spent. Ctrl-C ends the search
    with the best so far, if there is one.

    Args:
        costs: costs of a model cut into ``num_ranks * chunks[0]`` stages and a batch cut into the first number
            of ``microbatches``. For other numbers they are divided evenly, and so is the work of unequal
            microbatches.
        num_ranks: number of ranks.
        microbatches: number of microbatches, or several such numbers to try.
        chunks: numbers of stages on each rank to try.
        schedules: names to try; None: all that the engine can run.
        budget: limit in seconds; None: no limit.
        trials: the most orders to simulate. With no other limit, a seed finds the same plan.
        seed: seed of the random numbers, at least 0.
        on_progress: called with the outcome of each trial.

    Raises:
        InvalidArgument: for a search without limits, or numbers that are not valid.
        InvalidSchedule: for costs that do not fit, or if no plan can run.
    """
    num_ranks = arguments.count("num_ranks", num_ranks, _C.most_stages)
    counts = arguments.counts("microbatches", microbatches)
    chunks = arguments.counts("chunks", chunks)
    if budget is None and trials is None:
        raise InvalidArgument("the search would never end; give it a budget in seconds, or trials, or both")
    trials = None if trials is None else arguments.count("trials", trials)
    if not counts or not chunks:
        raise InvalidArgument("there is nothing to try; give at least one number of microbatches and of chunks")
    check_size(num_ranks * max(chunks), max(counts))
    arguments.check_seed(seed)
    check_factors(costs, num_ranks * chunks[0], counts[0])
    state = _Search(costs, num_ranks, chunks[0], counts[0], on_progress)
    cuts = [(chunk, count) for chunk in dict.fromkeys(chunks) for count in dict.fromkeys(counts)]
    deadline = math.inf if budget is None else state.begin + budget
    try:
        for chunk, count in cuts:
            state.try_schedules(chunk, count, schedules, deadline)
        state.search_orders(cuts, deadline, trials, seed)
    except KeyboardInterrupt:
        if state.best is None:
            raise
        state.interrupted = True
    return state.result(cuts)


class _Search:
    """The trials so far, and the best of them."""

    def __init__(
        self,
        costs: Costs,
        num_ranks: int,
        chunks: int,
        microbatches: int,
        on_progress: Callable[[Tried], None] | None,
    ) -> None:
        self.begin = time.perf_counter()
        self.best: Candidate | None = None
        self.interrupted = False
        self._costs, self._ranks, self._chunks, self._microbatches = costs, num_ranks, chunks, microbatches
        self._on_progress = on_progress
        self._tried: list[Tried] = []
        self._simulations = 0

    def costs_of(self, chunks: int, microbatches: int) -> Costs:
        """The costs of the same model and batch, cut into these numbers."""
        costs = recut(self._costs, self._ranks * self._chunks, self._ranks * chunks)
        if microbatches == self._microbatches:
            return costs
        return rebatched(costs, self._microbatches / microbatches)

    def try_schedules(
        self, chunks: int, microbatches: int, names: Sequence[str] | None, deadline: float
    ) -> None:
        """Tries the named schedules for these numbers; past the deadline, only until one can run."""
        for name in _C.schedule_names():
            if self.best is not None and time.perf_counter() > deadline:
                return
            if (names is not None and name not in names) or not _fits(_C.layout_of(name), chunks):
                continue
            plan = self._try(name, chunks, microbatches, None)
            if name == "1f1b" and plan is not None:
                for times in _WIDER:
                    room = [min(microbatches, math.ceil(times * limit)) for limit in plan.limits]
                    self._try(name, chunks, microbatches, room)

    def search_orders(
        self, cuts: Sequence[tuple[int, int]], deadline: float, trials: int | None, seed: int
    ) -> None:
        """Searches for an order for each cut; after a first look at all, they share the time evenly."""
        work = {cut: math.inf if trials is None else trials * self._num_tasks(cut) / len(cuts) for cut in cuts}
        speed = dict.fromkeys(cuts, math.inf)  # tasks placed per second
        if math.isfinite(deadline):
            for cut in cuts:
                first = int(min(work[cut], _FIRST_LOOK))
                begin = time.perf_counter()
                if not self._search_order(*cut, first, deadline - begin, seed):
                    return
                speed[cut] = first / (time.perf_counter() - begin)
                work[cut] -= first
        for i, cut in enumerate(cuts):
            seconds = (deadline - time.perf_counter()) / (len(cuts) - i)
            placed = min(work[cut], speed[cut] * seconds)
            placed = min(placed, _MOST_PLACED)
            if placed >= self._num_tasks(cut) and not self._search_order(*cut, int(placed), seconds, seed):
                return

    def result(self, cuts: Sequence[tuple[int, int]]) -> SearchResult:
        """The result. Raises InvalidSchedule if no plan can run."""
        if self.best is None:
            why = "; ".join(f"{tried.what}: {tried.reason}" for tried in self._tried[:3] if tried.reason)
            raise InvalidSchedule(f"none of {len(self._tried)} plans can run within the limits ({why})")
        return SearchResult(
            best=self.best,
            tried=self._tried,
            lower_bound=min(self._lower_bound(chunks, count) for chunks, count in cuts),
            simulations=self._simulations,
            seconds=time.perf_counter() - self.begin,
            interrupted=self.interrupted,
        )

    def _try(self, name: str, chunks: int, microbatches: int, room: list[int] | None) -> _C.Plan | None:
        what = name if room is None else f"{name}, up to {max(room)} in flight"
        stages = self._ranks * chunks
        try:
            plan = build_plan(
                name, num_stages=stages, num_ranks=self._ranks, microbatches=microbatches, room=room or ()
            )
            return self._offer(what, name, chunks, room, plan)
        except InvalidSchedule as error:
            self._note(Tried(what, chunks, microbatches, reason=str(error).partition("\n")[0]))
            return None

    def _num_tasks(self, cut: tuple[int, int]) -> int:
        chunks, microbatches = cut
        return zero_bubble.num_tasks(self._ranks * chunks, microbatches)

    def _search_order(self, chunks: int, microbatches: int, work: int, seconds: float, seed: int) -> bool:
        """Searches for an order; False if the time is over or Ctrl-C was pressed."""
        if seconds <= 0:
            return False
        costs = self.costs_of(chunks, microbatches)
        try:
            found = zero_bubble.find_order(
                costs,
                num_stages=self._ranks * chunks,
                num_ranks=self._ranks,
                microbatches=microbatches,
                span=False,
                work=work,
                seconds=seconds,
                seed=seed,
            )
        except InvalidSchedule as error:
            self._note(Tried(zero_bubble.NAME, chunks, microbatches, reason=str(error)))
            return True
        self._simulations += found.trials
        self.interrupted = self.interrupted or found.interrupted
        for what, cells in _with_and_without_whole_backwards(found.cells):
            self._offer(what, zero_bubble.NAME, chunks, None, _C.plan_of_cells(cells))
        return not self.interrupted

    def _offer(self, what: str, name: str, chunks: int, in_flight: list[int] | None, plan: _C.Plan) -> _C.Plan:
        simulation = simulate(plan, self.costs_of(chunks, plan.num_microbatches))
        self._simulations += 1
        self._note(Tried(what, chunks, plan.num_microbatches, simulation.makespan))
        if self.best is None or simulation.makespan < self.best.simulation.makespan:
            self.best = Candidate(name, chunks, plan.num_microbatches, in_flight, plan, simulation)
        return plan

    def _note(self, tried: Tried) -> None:
        self._tried.append(tried)
        if self._on_progress is not None:
            self._on_progress(tried)

    def _lower_bound(self, chunks: int, microbatches: int) -> float:
        stages = self._ranks * chunks
        by_stage = self.costs_of(chunks, microbatches).by_stage(stages, self._ranks)
        looped = [stage % self._ranks for stage in range(stages)]
        homes = looped, zero_bubble.rank_of_stage(stages, self._ranks)
        return min(_C.lower_bound(home, self._ranks, microbatches, by_stage)[0] for home in homes)


def _fits(layout: str, chunks: int) -> bool:
    return {"linear": chunks == 1, "v": chunks == 2, "looped": chunks > 1}.get(layout, False)


def _with_and_without_whole_backwards(
    cells: Sequence[Sequence[str]],
) -> Iterator[tuple[str, list[list[str]]]]:
    """An order of ``F``, ``I`` and ``W``; then the same with ``B`` for each ``I`` whose ``W`` comes next."""
    split = [list(actions) for actions in cells]
    yield zero_bubble.NAME, split
    whole = []
    for actions in split:
        row: list[str] = []
        for action in actions:
            if row and "W" in action and row[-1] == action.replace("W", "I"):
                row[-1] = action.replace("W", "B")
            else:
                row.append(action)
        whole.append(row)
    if whole != split:
        yield f"{zero_bubble.NAME}, whole backwards where I and W meet", whole
