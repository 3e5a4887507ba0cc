"""What tasks, messages and activations cost: the input of every simulation."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .. import _C
from ..errors import InvalidArgument, InvalidSchedule
from . import costs_file, microbatch_factors
from .costs_file import BOUNDARY, LISTED_BY, MICROBATCH, STAGE

PerStage = float | Sequence[float]

_UNIT = 1.0  # memory of a microbatch at a stage, if it is not given


@dataclass(frozen=True)
class Costs:
    """Times of tasks and links, and memory, each in any one unit.

    A number holds for every stage, boundary or rank; a list has one number for each.

    Attributes:
        forward: time of ``F``, by stage.
        backward: time of ``B``, the full backward, by stage.
        input_grad: time of ``I``, by stage; None: half of ``backward``.
        weight_grad: time of ``W``, by stage; None: ``backward`` minus ``input_grad``.
        latency: time of a message on its way to another rank, by boundary between stages.
        overhead: time that a message takes its sender, by boundary.
        bandwidth: bytes in a unit of time, by boundary. Each boundary has one link for each direction, and a
            message occupies it for its bytes. Together with the two above this is the LogGP model (Alexandrov
            et al., LogGP, SPAA 1995).
        message_bytes: bytes of one microbatch's result, by boundary.
        contention: factor by which a task takes longer while the other stream of its rank is busy (only plans
            with ``overlap``).
        pair: time of an overlapped pair ``(2F0;1B3)OVERLAP_F_B``, as a share of the time that its actions take
            one after another.
        act_memory: memory that ``F`` of a microbatch takes, by stage. ``B`` frees it all. None: 1, or what the
            first step measures for ``Pipeline(in_flight="auto")``, whose ``memory_limit`` is then in bytes.
        mem_i: the part that ``I`` frees, by stage; None: ``act_memory`` minus ``mem_w``, or nothing if neither
            is given.
        mem_w: the part that ``W`` frees, by stage; None: ``act_memory`` minus ``mem_i``, or all if neither is
            given.
        memory_limit: memory that the microbatches of a rank may take at once, by rank; None: no limit.
        microbatch: factors on the times of unequal microbatches: a list of M, one for each microbatch of the
            step; or S such lists, one for each stage; or S lists of M lists of four, the factors of ``F``,
            ``B``, ``I`` and ``W``. Each is finite and at least 0. They change neither messages nor memory.
            None: the microbatches are equal.

    Raises InvalidArgument for what is no number and no list of numbers, and for factors that are not valid.
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
    act_memory: PerStage | None = None
    mem_i: PerStage | None = None
    mem_w: PerStage | None = None
    memory_limit: PerStage | None = None
    microbatch: microbatch_factors.Factors | None = None

    def __post_init__(self) -> None:
        if self.microbatch is not None:
            factors = microbatch_factors.checked(MICROBATCH, self.microbatch)
            object.__setattr__(self, "microbatch", factors)
        for name, listed_by in LISTED_BY.items():
            value = getattr(self, name)
            if name != MICROBATCH and (value is not None or getattr(Costs, name) is not None):
                _check_numbers(name, value, listed_by)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Costs":
        """Reads costs from a JSON file: one object of the attributes above, each a number or a list.

        Raises InvalidArgument, which names the key, for values that are not valid.
        """
        return cls(**costs_file.read(path))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON file that ``load`` and ``pipeline-ext plan --costs`` read.

        Raises PipelineError if the file cannot be written.
        """
        costs_file.write(path, asdict(self))

    def times(self, num_stages: int) -> dict[str, list[float]]:
        """Times of ``F``, ``B``, ``I`` and ``W``, by stage."""
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
        """Memory of one microbatch, by stage: what ``F`` takes, and what ``I`` frees of it.

        Raises InvalidSchedule if ``I`` and ``W`` free more than ``F`` takes.
        """
        taken = _spread(_UNIT if self.act_memory is None else self.act_memory, num_stages)
        if self.mem_i is None and self.mem_w is None:
            return taken, [0.0] * num_stages
        by_w = [0.0] * num_stages if self.mem_w is None else _spread(self.mem_w, num_stages)
        by_i = [a - w for a, w in zip(taken, by_w)] if self.mem_i is None else _spread(self.mem_i, num_stages)
        for a, i, w in zip(taken, by_i, by_w):
            if i < 0 or i + w > a * (1 + 1e-6):
                raise InvalidSchedule(
                    f"mem_i {i:g} and mem_w {w:g} free more than the act_memory {a:g} that F takes; together "
                    "they are at most as much"
                )
        return taken, by_i

    def with_memory_of(self, other: "Costs") -> "Costs":
        """These times with the memory and the limit of ``other``."""
        return replace(
            self,
            act_memory=other.act_memory,
            mem_i=other.mem_i,
            mem_w=other.mem_w,
            memory_limit=other.memory_limit,
        )

    def reordered(self, order: Sequence[int]) -> "Costs":
        """The costs of a step whose microbatch i is microbatch ``order[i]`` of this one.

        Raises InvalidArgument unless ``order`` lists each microbatch once.
        """
        if self.microbatch is None:
            return self
        count = microbatch_factors.num_microbatches(self.microbatch)
        try:
            complete = sorted(order) == list(range(count))
        except TypeError:
            complete = False
        if not complete:
            raise InvalidArgument(
                f"order is {order!r:.60}; give each of the {count} microbatches, from 0 to {count - 1}, once"
            )
        return replace(self, microbatch=microbatch_factors.reordered(self.microbatch, order))

    def by_stage(self, num_stages: int, num_ranks: int) -> _C.CostsByStage:
        """All costs as lists, by stage, boundary or rank.

        Raises InvalidSchedule for bandwidths, bytes or memory that are not valid.
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
        factors: list[float] = []
        shape = (0, 0, 0)
        if self.microbatch is not None:
            factors, shape = microbatch_factors.flat(self.microbatch)
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
            microbatch=factors,
            microbatch_shape=shape,
        )


def recut(costs: Costs, num_stages: int, wanted: int) -> Costs:
    """Costs of a model cut into ``wanted`` stages, from its costs when cut into ``num_stages``.

    A stage's cost is spread evenly over the stage. Raises InvalidSchedule for lists by boundary, because the
    new cut has other boundaries, and for factors of another number of stages.
    """
    if num_stages == wanted:
        return costs
    cut: dict[str, Any] = {}
    costs = _with_unit(costs)
    for name, listed_by in LISTED_BY.items():
        cost = getattr(costs, name)
        if listed_by == STAGE and cost is not None:
            cut[name] = _recut(cost, num_stages, wanted)
        elif listed_by == BOUNDARY and not isinstance(cost, (int, float)):
            raise InvalidSchedule(
                f"{name} is given for each boundary between {num_stages} stages, and there are {wanted} "
                "here; give one number for all"
            )
    if costs.microbatch is not None:
        check_factors(costs, num_stages)
        cut[MICROBATCH] = microbatch_factors.recut(
            costs.microbatch, costs.times(num_stages), num_stages, wanted
        )
    return replace(costs, **cut)


def check_factors(costs: Costs, num_stages: int, microbatches: int | None = None) -> None:
    """Raises InvalidSchedule if ``costs.microbatch`` is for other numbers of stages or microbatches."""
    if costs.microbatch is None:
        return
    factors_for = microbatch_factors.num_microbatches(costs.microbatch)
    if microbatches not in (None, factors_for):
        raise InvalidSchedule(
            f"microbatch has factors for {factors_for} microbatches; give one for each of the {microbatches} "
            "microbatches"
        )
    listed = microbatch_factors.num_stages(costs.microbatch)
    if listed not in (None, num_stages):
        raise InvalidSchedule(
            f"microbatch has lists for {listed} stages; give one list for all, or one for each of the "
            f"{num_stages} stages"
        )


def rebatched(costs: Costs, factor: float) -> Costs:
    """Costs when a microbatch has ``factor`` times as many rows.

    Work is spread evenly over a microbatch, so the factor of one that covers parts of others is their mean.
    """

    def times(cost: PerStage) -> PerStage:
        return cost * factor if isinstance(cost, (int, float)) else [c * factor for c in cost]

    costs = _with_unit(costs)
    names = [*(name for name, listed_by in LISTED_BY.items() if listed_by == STAGE), "message_bytes"]
    grown: dict[str, Any] = {name: times(cost) for name in names if (cost := getattr(costs, name)) is not None}
    if costs.microbatch is not None:
        grown[MICROBATCH] = microbatch_factors.rebatched(costs.microbatch, factor)
    return replace(costs, **grown)


def _with_unit(costs: Costs) -> Costs:
    return costs if costs.act_memory is not None else replace(costs, act_memory=_UNIT)


def _recut(cost: PerStage, num_stages: int, wanted: int) -> PerStage:
    if isinstance(cost, (int, float)):
        return float(cost) * num_stages / wanted

    def between(begin: float, end: float) -> float:
        return sum(c * max(0.0, min(end, s + 1) - max(begin, s)) for s, c in enumerate(cost))

    length = num_stages / wanted
    return [between(s * length, (s + 1) * length) for s in range(wanted)]


def _check_numbers(name: str, value: Any, listed_by: str | None) -> None:
    """Raises InvalidArgument unless ``value`` is a number or, if ``listed_by``, a list of numbers."""
    listed = (
        listed_by is not None and hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping))
    )
    try:
        for number in value if listed else [value]:
            if isinstance(number, (str, bytes)) or not (listed or isinstance(number, (int, float))):
                raise TypeError
            float(number)
    except (TypeError, ValueError, OverflowError):
        accepted = "a number" + (f", or a list of {listed_by}" if listed_by else "")
        raise InvalidArgument(f"{name} is {value!r:.60}; give {accepted}") from None


def _spread(cost: PerStage, count: int) -> list[float]:
    if isinstance(cost, (int, float)):
        return [float(cost)] * count
    return [float(c) for c in cost]
