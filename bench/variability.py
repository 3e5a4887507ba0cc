"""A training step whose times vary: ranks that react, ranks that keep their order, and the peer.

Four gloo processes hold every contender, which take turns. The stages wait instead of computing, so that a
machine with few cores carries them, and all wait the same times in the same round. Beside each stand the step
as simulated with those very times and the time that no order of the stages can beat. Writes
bench/results/variability.json.
"""

import argparse
import functools
import importlib
import math
import queue
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from environment import write_results
from side_by_side import Contender, one_thread_a_process, running, spread, wait_until_quiet
from torch import Tensor, nn
from turns import rounds_until

import pipeline_ext as pe
from pipeline_ext import _C
from pipeline_ext.processes.connections import Connections

RANKS = 4
MICROBATCHES = 12
ROWS = 4  # of a microbatch as given
SLOTS = 8  # microbatches that a rank may hold where it finds how many: twice what the fullest does in 1F1B
SECONDS = {"F": 20e-3, "I": 20e-3, "W": 20e-3}  # of a rank and microbatch, in the mean
SCHEDULES = {"1f1b": "1F1B", "zb-h1": None, "interleaved-1f1b": "Interleaved1F1B"}  # and the peer's name
LATE_WAKING = 0.04  # of a step: a step in which a rank's waits ended later than that is run again,
ATTEMPTS = 4  # up to so many times, for other programs held it up
KINDS = "FIW"
STATIC, REACTIVE, MORE, AUTO = "static", "reactive", "reactive, more slots", "auto"
ORDERED, BALANCED = "reactive, ordered", "reactive, balanced and ordered"
PEERS = {"drop-in": "pipeline_ext.pipelining", "torch": "torch.distributed.pipelining"}
MIXTURE, LATE = "by microbatch", "late messages"

Factors = list[list[list[float]]]
"""By stage, microbatch and kind."""


def log_normal(cv: float, chance: random.Random) -> float:
    """A factor of mean 1."""
    variance = math.log1p(cv * cv)
    return math.exp(chance.gauss(-variance / 2, math.sqrt(variance)))


def independent(cv: float, chance: random.Random, stages: int) -> Factors:
    return [[[log_normal(cv, chance) for _ in KINDS] for _ in range(MICROBATCHES)] for _ in range(stages)]


def mixture(chance: random.Random, stages: int) -> Factors:
    """A microbatch is as long at every stage. The mean is 1."""
    kinds, weights = (1, 2, 6), (0.7, 0.2, 0.1)
    mean = sum(length * weight for length, weight in zip(kinds, weights))
    lengths = [chance.choices(kinds, weights)[0] / mean for _ in range(MICROBATCHES)]
    return [[[length] * len(KINDS) for length in lengths] for _ in range(stages)]


def straggler(chance: random.Random, stages: int) -> Factors:
    slow = chance.randrange(RANKS)
    rows = independent(0.1, chance, stages)
    for stage in range(slow, stages, RANKS):
        rows[stage] = [[1.5 * factor for factor in of_kind] for of_kind in rows[stage]]
    return rows


def equal(chance: random.Random, stages: int) -> Factors:
    return [[[1.0] * len(KINDS)] * MICROBATCHES] * stages


SCENARIOS: dict[str, Callable[[random.Random, int], Factors]] = {
    "independent, cv 0.3": functools.partial(independent, 0.3),
    "independent, cv 1": functools.partial(independent, 1.0),
    MIXTURE: mixture,
    "a slow rank": straggler,
    LATE: equal,
}


class Round(NamedTuple):
    """A step for the ranks to run."""

    schedule: str
    engine: str
    scenario: str
    seed: int


class LateSends:
    """Lets this process's messages leave at random up to ``most`` seconds late, in their order to each process.

    The sender goes on meanwhile; threads of this object wait. It stands in for the sends of both packages.
    """

    def __init__(self) -> None:
        self.most = 0.0
        self._chance = random.Random()
        self._links: dict[int, queue.SimpleQueue] = {}
        for group, name in ((Connections, "send"), (dist.ProcessGroup, "send")):
            setattr(group, name, self._instead_of(getattr(group, name)))

    def begin(self, most: float, seed: int) -> None:
        self.most = most
        self._chance.seed(seed)

    def _instead_of(self, send: Callable[..., Any]) -> Callable[..., Any]:
        def late(group: Any, tensors: list[Tensor], rank: int, tag: int) -> Any:
            if not self.most:
                return send(group, tensors, rank, tag)
            if rank not in self._links:
                self._links[rank] = queue.SimpleQueue()
                threading.Thread(target=_deliver, args=(self._links[rank],), daemon=True).start()
            due = time.monotonic() + self._chance.uniform(0, self.most)
            copies = [tensor.clone() for tensor in tensors]  # as a network does: the sender may go on
            self._links[rank].put((due, functools.partial(send, group, copies, rank, tag)))
            return _Left()

        return late


class _Left:
    """In place of what a send returns."""

    def wait(self, *limit: Any) -> bool:
        return True


def _deliver(link: queue.SimpleQueue) -> None:
    while True:
        due, send = link.get()
        time.sleep(max(0.0, due - time.monotonic()))
        send().wait()


class Clock:
    """The factors of the step that runs."""

    factors: Factors
    share: float  # of SECONDS, for each stage
    late: float  # seconds that waits took longer than they were to

    def wait(self, seconds: float) -> None:
        begin = time.monotonic()
        time.sleep(seconds)
        self.late += time.monotonic() - begin - seconds


class _Waits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, clock: Clock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.wait(ctx.seconds)
        return grad, None, None


class Stage(nn.Module):
    """Waits in its forward, in the gradient of its input and in that of its weight; hands its input on."""

    def __init__(self, clock: Clock, stage: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._clock, self._stage = clock, stage

    def forward(self, value: Tensor) -> Tensor:
        forward, of_input, of_weight = self._seconds(value)
        self._clock.wait(forward)
        return _Waits.apply(value, self._clock, of_input) + _Waits.apply(self.weight, self._clock, of_weight)

    def _seconds(self, value: Tensor) -> list[float]:
        if value.is_meta:
            return [0.0, 0.0, 0.0]  # the peer only asks for shapes
        last = ROWS * MICROBATCHES - 1
        rows = value.detach().flatten().nan_to_num(0).clamp(0, last).int().tolist()
        factors = [self._clock.factors[self._stage][row // ROWS] for row in rows]
        return [
            self._clock.share * SECONDS[kind] * sum(of_row) / ROWS for kind, of_row in zip(KINDS, zip(*factors))
        ]


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def num_stages(schedule: str) -> int:
    return 2 * RANKS if schedule == "interleaved-1f1b" else RANKS


def batch() -> Tensor:
    """Each row says which it is, and wants its gradient, so that the first stage has an `I` too."""
    return torch.arange(float(ROWS * MICROBATCHES)).view(-1, 1).requires_grad_()


class Ours:
    """A Pipeline, and what it is given."""

    def __init__(self, clock: Clock, schedule: str, engine: str) -> None:
        stages = [Stage(clock, stage) for stage in range(num_stages(schedule))]
        options: dict[str, Any] = {"reactive": engine != STATIC}
        if engine == MORE:
            costs = pe.Costs(act_memory=1.0, memory_limit=SLOTS * len(stages) / RANKS)
            options |= {"in_flight": "auto", "costs": costs}
        name = "auto" if engine == AUTO else schedule
        self.pipe = pe.Pipeline(
            stages, len(stages), MICROBATCHES, name, loss_fn=loss_fn, mesh=dist.group.WORLD, **options
        )
        self._engine, self._schedule = engine, schedule
        self._given = [list(range(m * ROWS, (m + 1) * ROWS)) for m in range(MICROBATCHES)]

    def prepare(self, factors: Factors, latency: float) -> tuple[Callable[[], object], pe.Costs]:
        """The step, and the costs of its microbatches as they enter."""
        parts = self._given
        if self._engine == BALANCED:
            least = min(factor for factor, *_ in factors[0])
            lengths = [round(factors[0][row // ROWS][0] / least) for row in range(ROWS * MICROBATCHES)]
            parts = pe.balanced_microbatches(lengths, MICROBATCHES)
        of_parts = [
            [[sum(of_row) / ROWS for of_row in zip(*(of_stage[row // ROWS] for row in part))] for part in parts]
            for of_stage in factors
        ]
        costs = costs_of(self._schedule, of_parts, latency)
        if self._engine in (ORDERED, BALANCED):
            order = pe.microbatch_order(self.pipe.plan, costs).order
            parts = [parts[given] for given in order]
            costs = costs.reordered(order)
        x = batch().detach()
        args = [(x[part].requires_grad_(),) for part in parts]
        targets = [x[part] for part in parts]
        return functools.partial(self.pipe.step, arg_mbs=args, target_mbs=targets), costs

    def promised(self, costs: pe.Costs) -> tuple[float, float]:
        """The simulated step, and a time that no order of these stages can beat."""
        plan = self.pipe.plan
        by_stage = costs.by_stage(plan.num_stages, plan.num_ranks)
        bound, _ = _C.lower_bound(plan.rank_of_stage, plan.num_ranks, plan.num_microbatches, by_stage)
        return pe.simulate(plan, costs, processes=True).makespan, bound

    def close(self) -> None:
        self.pipe.close()


class Theirs:
    """A schedule of torch.distributed.pipelining, or of the drop-in for it."""

    def __init__(self, clock: Clock, schedule: str, engine: str) -> None:
        from torch.distributed.pipelining import PipelineStage

        count = num_stages(schedule)
        mine = list(range(dist.get_rank(), count, RANKS))
        stages = [PipelineStage(Stage(clock, i), i, count, torch.device("cpu")) for i in mine]
        make = importlib.import_module(f"{PEERS[engine]}.schedules").get_schedule_class(SCHEDULES[schedule])
        runner = make(stages if count > RANKS else stages[0], MICROBATCHES, loss_fn=loss_fn)
        self._step = functools.partial(runner.step, return_outputs=False)
        self._first, self._last = 0 in mine, count - 1 in mine

    def prepare(self, factors: Factors, latency: float) -> tuple[Callable[[], object], None]:
        x = batch()
        step = functools.partial(self._step, x) if self._first else self._step
        if self._last:
            step = functools.partial(step, target=x.detach(), losses=[])
        return step, None

    def promised(self, costs: None) -> None:
        return None

    def close(self) -> None:
        pass


def costs_of(schedule: str, factors: Factors, latency: float) -> pe.Costs:
    share = RANKS / num_stages(schedule)
    forward, of_input, of_weight = (share * SECONDS[kind] for kind in KINDS)
    table = [
        [[f, (of_input * i + of_weight * w) / (of_input + of_weight), i, w] for f, i, w in rows]
        for rows in factors
    ]
    return pe.Costs(
        forward=forward,
        backward=of_input + of_weight,
        input_grad=of_input,
        weight_grad=of_weight,
        latency=latency,
        microbatch=table,
    )


def rank_of_all(store: str, rank: int) -> Callable[[Round], tuple]:
    """One of the processes, which holds its part of every contender."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    clock, late = Clock(), LateSends()
    contenders: dict[tuple[str, str], Ours | Theirs] = {}

    def run(round_: Round) -> tuple:
        """When this rank began and ended its step, how late waits ended, the promised step and the bound."""
        schedule, engine, scenario, seed = round_
        stages = num_stages(schedule)
        clock.factors = SCENARIOS[scenario](random.Random(seed), stages)
        clock.share, clock.late = RANKS / stages, 0.0
        most = SECONDS["F"] if scenario == LATE else 0.0
        if (schedule, engine) not in contenders:
            contenders[schedule, engine] = (Theirs if engine in PEERS else Ours)(clock, schedule, engine)
            late.begin(0.0, 0)
            for _ in range(4 if engine == AUTO else 1):  # which measures three and chooses
                step, _ = contenders[schedule, engine].prepare(clock.factors, 0.0)
                step()
        contender = contenders[schedule, engine]
        step, costs = contender.prepare(clock.factors, most / 2)
        late.begin(most, RANKS * seed + rank)
        dist.barrier()
        clock.late = 0.0
        begin = time.monotonic()
        step()
        end = time.monotonic()
        dist.barrier()  # by then all messages have come
        late.begin(0.0, 0)
        return begin, end, clock.late, contender.promised(costs) if rank == 0 else None

    return run


def engines_of(schedule: str, scenario: str) -> list[str]:
    engines = [STATIC, REACTIVE, MORE]
    if scenario == MIXTURE:
        engines += [ORDERED, BALANCED]
    if schedule == "1f1b":
        engines.append(AUTO)  # chooses the schedule, so one serves for all of one stage a rank
    return engines + (list(PEERS) if SCHEDULES[schedule] else [])


class Case:
    """What the rounds of one contender brought."""

    def __init__(self, scenario: str, schedule: str, engine: str) -> None:
        self.scenario, self.schedule, self.engine = scenario, schedule, engine
        self.seconds: list[float] = []
        self.shares: list[tuple[float, ...]] = []  # of the promise and the bound in the step
        self.held_up = 0  # rounds whose every attempt was

    def run(self, ranks: Contender, seed: int) -> None:
        for _ in range(ATTEMPTS):
            spans = ranks.run(Round(self.schedule, self.engine, self.scenario, seed))
            took = max(span[1] for span in spans) - min(span[0] for span in spans)
            if max(span[2] for span in spans) < LATE_WAKING * took:
                break
        else:
            self.held_up += 1
        self.seconds.append(took)
        if spans[0][3] is not None:
            self.shares.append(tuple(seconds / took for seconds in spans[0][3]))

    def row(self, others: dict[str, "Case"]) -> dict:
        """Its figures; ``others``: by engine, of the same scenario and schedule."""
        row = {
            "scenario": self.scenario,
            "schedule": self.schedule,
            "engine": self.engine,
            "held_up": self.held_up,
            "step_ms": spread([1e3 * took for took in self.seconds]),
        }
        for other in (STATIC, "torch"):
            if other in others and self.engine not in (other, "torch"):
                ratios = [theirs / ours for theirs, ours in zip(others[other].seconds, self.seconds)]
                row[f"faster_than_{other}"] = spread(ratios)
        if self.shares:
            promised, bound = zip(*self.shares)
            row |= {"promised_over_measured": spread(promised), "bound_over_measured": spread(bound)}
        return row


def tell(row: dict) -> None:
    names = ("faster_than_static", "faster_than_torch", "promised_over_measured", "bound_over_measured")
    figures = [f"{row['step_ms']['median']:6.0f} ms"]
    figures += [name + " {min:.2f} {median:.2f} {max:.2f}".format(**row[name]) for name in names if name in row]
    print(f"{row['scenario']:19} {row['schedule']:16} {row['engine']:30}", "  ".join(figures), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES))
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no round after them")
    options = parser.parse_args()
    one_thread_a_process()
    cases = {
        (schedule, scenario): {
            engine: Case(scenario, schedule, engine) for engine in engines_of(schedule, scenario)
        }
        for schedule in options.schedules
        for scenario in options.scenarios
    }
    with tempfile.TemporaryDirectory() as folder:
        ranks = Contender("ranks", rank_of_all, str(Path(folder) / "store"), ranks=RANKS)
        with running([ranks]):
            quiet = wait_until_quiet(10.0)
            for seed in rounds_until(time.monotonic() + 60 * options.minutes, least=3, most=25):
                for engines in cases.values():
                    for case in random.Random(seed).sample(list(engines.values()), len(engines)):
                        case.run(ranks, seed)
                print(f"round {seed}: {time.strftime('%X')}", flush=True)
    rows = [case.row(engines) for engines in cases.values() for case in engines.values()]
    for row in rows:
        tell(row)
    medians = [row["faster_than_static"]["median"] for row in rows if row["engine"] == REACTIVE]
    print(f"reactive over static, least of medians {min(medians):.3f}, median {statistics.median(medians):.3f}")
    about = {"ranks": RANKS, "microbatches": MICROBATCHES, "seconds": SECONDS, "rounds": seed + 1}
    write_results("variability", **about, quiet=quiet, rows=rows)


if __name__ == "__main__":
    main()
