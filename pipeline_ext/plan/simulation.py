"""What a plan would take: the scheduler under a virtual clock."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from .. import _C
from ..errors import InvalidArgument, InvalidSchedule
from . import costs_file

PerStage = float | Sequence[float]


@dataclass(frozen=True)
class Costs:
    """Times of tasks and links, and memory, each in any one unit; a number stands for every stage, boundary
    or rank.

    Attributes:
        forward: of F, by stage.
        backward: of B, the full backward, by stage.
        input_grad: of I, by stage; None: half of ``backward``.
        weight_grad: of W, by stage; None: what ``input_grad`` leaves of ``backward``.
        latency: of a message on its way to another rank, by boundary between stages.
        overhead: what a message costs its sender, by boundary.
        bandwidth: bytes in a unit of time, by boundary; each message occupies the boundary's link, of
            which there is one for each direction, for its bytes. With the two above this is the LogGP
            model (Alexandrov et al., LogGP, SPAA 1995).
        message_bytes: of one microbatch's result, by boundary.
        contention: factor by which a task takes longer while its rank's other stream is busy too
            (plans with ``overlap`` only).
        pair: time of an overlapped pair ``(2F0;1B3)OVERLAP_F_B``, as a share of what its actions take one
            after another.
        act_memory: what a microbatch's F takes, by stage. B frees it all.
        mem_i: what I frees of it, by stage; None: what ``mem_w`` leaves.
        mem_w: what W frees of it, by stage; None: what ``mem_i`` leaves, all where neither is given.
        memory_limit: what a rank's microbatches may take at once, by rank; None: any amount.
    """

    forward: PerStage = 1.0
    backward: PerStage = 2.0
    input_grad: PerStage | None = None
    weight_grad: PerStage | None = None
    latency: PerStage = 0.0
    overhead: PerStage = 0.0
    bandwidth: PerStage = math.inf
    message_bytes: PerStage = 0.0
    contention: float = 1.0
    pair: float = 1.0
    act_memory: PerStage = 1.0
    mem_i: PerStage | None = None
    mem_w: PerStage | None = None
    memory_limit: PerStage | None = None

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Costs":
        """The costs in a JSON file: one object of the attributes above, each a number or a list.

        Raises InvalidArgument, naming the key, for what is no cost.
        """
        return cls(**costs_file.read(path))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the file that ``load`` reads, and ``pipeline-ext plan --costs``.

        Raises PipelineError where it cannot be written.
        """
        costs_file.write(path, asdict(self))

    def times(self, num_stages: int) -> dict[str, list[float]]:
        """Of F, B, I and W, by stage."""
        backward = _spread(self.backward, num_stages)
        if self.input_grad is None:
            input_grad = [b / 2 for b in backward]
        else:
            input_grad = _spread(self.input_grad, num_stages)
        if self.weight_grad is None:
            weight_grad = [b - i for b, i in zip(backward, input_grad)]
        else:
            weight_grad = _spread(self.weight_grad, num_stages)
        return {"F": _spread(self.forward, num_stages), "B": backward, "I": input_grad, "W": weight_grad}

    def memory(self, num_stages: int) -> tuple[list[float], list[float]]:
        """Of one microbatch, by stage: what F takes, and what I frees of it.

        Raises InvalidSchedule where more is freed than taken.
        """
        taken = _spread(self.act_memory, num_stages)
        if self.mem_i is None and self.mem_w is None:
            return taken, [0.0] * num_stages
        by_w = None if self.mem_w is None else _spread(self.mem_w, num_stages)
        by_i = [a - w for a, w in zip(taken, by_w)] if self.mem_i is None else _spread(self.mem_i, num_stages)
        for a, i, w in zip(taken, by_i, by_w or [0.0] * num_stages):
            if i < 0 or i + w > a * (1 + 1e-6):
                raise InvalidSchedule(
                    f"mem_i {i:g} and mem_w {w:g} free more than the act_memory {a:g} that F takes; together "
                    "they are at most as much"
                )
        return taken, by_i

    def with_memory_of(self, other: "Costs") -> "Costs":
        """These times, with what ``other`` says of memory."""
        return replace(
            self,
            act_memory=other.act_memory,
            mem_i=other.mem_i,
            mem_w=other.mem_w,
            memory_limit=other.memory_limit,
        )

    def by_stage(self, num_stages: int, num_ranks: int) -> _C.CostsByStage:
        """Each of the costs as a list, by stage, boundary or rank.

        Raises InvalidSchedule for bandwidths, bytes and memory that cannot be.
        """
        times = self.times(num_stages)
        taken, freed_by_input_grad = self.memory(num_stages)
        boundaries = num_stages - 1
        nbytes = _spread(self.message_bytes, boundaries)
        bandwidth = _spread(self.bandwidth, boundaries)
        if min(bandwidth, default=1.0) <= 0:
            raise InvalidSchedule(f"bandwidth holds {min(bandwidth):g}; it is bytes in a unit of time, above 0")
        if min(nbytes, default=0.0) < 0:
            raise InvalidSchedule(f"message_bytes holds {min(nbytes):g}; it is not negative")
        return _C.CostsByStage(
            forward=times["F"],
            backward=times["B"],
            input_grad=times["I"],
            weight_grad=times["W"],
            latency=_spread(self.latency, boundaries),
            overhead=_spread(self.overhead, boundaries),
            transfer=[n / b for n, b in zip(nbytes, bandwidth)],
            contention=float(self.contention),
            pair=float(self.pair),
            taken=taken,
            freed_by_input_grad=freed_by_input_grad,
            memory_limit=[] if self.memory_limit is None else _spread(self.memory_limit, num_ranks),
        )


class Simulation:
    """A simulated step. Times are in the unit of the costs.

    Attributes:
        plan: the plan that was simulated.
        makespan: from the first task's begin to the last one's end.
        bubble: share of the makespan in which a rank runs nothing, mean over ranks.
        bubble_by_rank: the same for each rank.
        bubble_latest: of the rank that finishes last, share of the makespan.
        bubble_from_first_start: of the rank with the longest span from its own first task's begin to its last
            one's end, the share of that span in which it runs nothing.
        first_start: when a rank's first task begins, by rank.
        finish: when its last task ends, by rank.
        peak_in_flight: most microbatches alive at once, by rank.
        peak_in_flight_of_stage: the same by stage.
        peak_memory: the most that microbatches take at once, by rank, in the unit of the costs.
        working_bytes: memory the simulation took beside the plan.
    """

    def __init__(self, plan: _C.Plan, costs: _C.CostsByStage, times: _C.SimulatedTimes) -> None:
        self.plan = plan
        self.makespan: float = times.makespan
        self.bubble: float = times.bubble
        self.bubble_by_rank = [times.bubble_of(rank) for rank in range(plan.num_ranks)]
        self.bubble_latest: float = times.bubble_latest
        self.bubble_from_first_start: float = times.bubble_from_first_start
        self.first_start: list[float] = times.first_start
        self.finish: list[float] = times.finish
        self.peak_in_flight: list[int] = times.peak_in_flight
        self.peak_in_flight_of_stage: list[int] = times.peak_in_flight_of_stage
        self.peak_memory: list[float] = times.peak_memory
        self.working_bytes: int = times.working_bytes
        self._costs = costs
        self._times = times

    def __repr__(self) -> str:
        return f"<Simulation: makespan {self.makespan:g}, bubble {self.bubble:.1%}>"

    @property
    def begin(self) -> list[float]:
        """When each task begins, numbered as in the plan."""
        return self._times.begin

    @property
    def end(self) -> list[float]:
        """When each task ends."""
        return _C.end_times(self.plan, self._costs, self._times)

    def order(self) -> dict[int, list[str]]:
        """Rank -> its actions as text, as they began."""
        return dict(enumerate(_C.simulated_order(self.plan, self._times)))


def simulate(plan: _C.Plan, costs: Costs = Costs(), *, noise: float = 0.0, seed: int = 0) -> Simulation:
    """Runs ``plan`` under a virtual clock.

    Args:
        plan: what to run. One whose ranks react keeps ``costs.memory_limit`` as it goes: they start their
            F in the planned order, each when it fits.
        costs: of tasks, links and memory.
        noise: coefficient of variation of a random factor of mean 1, log-normal, on the time of each task.
        seed: of those factors, at least 0; the same action gets the same one in every mode.

    Raises InvalidSchedule if the costs do not fit the plan or add up to no finite time, or its order exceeds a
    limit of memory, and InvalidArgument for another seed.
    """
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise InvalidArgument(f"seed is {seed!r}; give a whole number from 0 on")
    by_stage = costs.by_stage(plan.num_stages, plan.num_ranks).with_noise(noise, seed)
    times = _C.simulate(plan, by_stage)
    if times.makespan == math.inf:
        raise InvalidSchedule("the step takes longer than a number can tell; give times in a larger unit")
    return Simulation(plan, by_stage, times)


def _spread(cost: PerStage, count: int) -> list[float]:
    if isinstance(cost, (int, float)):
        return [float(cost)] * count
    return [float(c) for c in cost]
