"""What tasks and messages cost, measured in a step."""

import functools
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from .. import _C
from .records import Messages, TaskRecord
from .costs import Costs


@dataclass(frozen=True)
class Profile:
    """Seconds that one microbatch takes at each stage, and what its results cost on their way.

    Attributes:
        forward, backward: of F and B, without what the link took; by stage, medians over the step. Where a
            stage ran I and W instead, B is their sum.
        input_grad, weight_grad: the same of I and W; of a stage that ran B, half of it. None where all did.
        latency: from the end of a task to the begin of one on another rank that waited for it; median, by
            boundary, of both directions.
        overhead: that the sender spends on a message, by boundary.
        bandwidth: bytes a second of the link, by boundary; infinite where messages are passed by reference.
        result_bytes: of the first microbatch's result, by boundary.
        packed: whether the times of the stages hold that of packing, by boundary.
    """

    forward: list[float]
    backward: list[float]
    latency: list[float]
    overhead: list[float]
    bandwidth: list[float]
    result_bytes: list[int]
    packed: list[bool]
    input_grad: list[float] | None = None
    weight_grad: list[float] | None = None

    def costs(self, plan: _C.Plan | None = None) -> Costs:
        """What ``plan`` would cost; None: one that packs nothing.

        Where it packs what the step handed over, that is measured now.
        """
        forward, backward = list(self.forward), list(self.backward)
        input_grad = None if self.input_grad is None else list(self.input_grad)
        for b, (nbytes, packed) in enumerate(zip(self.result_bytes, self.packed)):
            if packed or plan is None:
                continue
            if plan.packs_forward[b] > 1:
                forward[b] += packing_time(nbytes)
            if plan.packs[b] > 1:
                for gradient in filter(None, (backward, input_grad)):
                    gradient[b + 1] += packing_time(nbytes)
        return Costs(
            forward=forward,
            backward=backward,
            input_grad=input_grad,
            weight_grad=self.weight_grad,
            latency=self.latency,
            overhead=self.overhead,
            bandwidth=self.bandwidth,
            message_bytes=self.result_bytes,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the costs of a plan that packs nothing, in seconds, for ``Costs.load``.

        ``pipeline-ext plan --costs`` takes the file too. Raises PipelineError where it cannot be written.
        """
        self.costs().save(path)


def profile(plan: _C.Plan, tasks: Sequence[TaskRecord], messages: Sequence[Messages]) -> Profile:
    """Of one step."""
    boundaries = range(plan.num_stages - 1)
    by_boundary = {b: [m for m in messages if m.boundary == b and m.skip is None] for b in boundaries}
    overhead = [_mean_overhead(by_boundary[b]) for b in boundaries]
    result_bytes = [max((m.result_nbytes for m in by_boundary[b]), default=0) for b in boundaries]

    def median(kind: str, stage: int) -> float:
        times = []
        for task in tasks:
            if task.kind == kind and task.stage == stage:
                boundary = stage if kind == "F" else stage - 1
                sends = plan.num_messages_of(task.task)
                times.append(task.end - task.begin - (sends * overhead[boundary] if sends else 0.0))
        return max(0.0, statistics.median(times)) if times else 0.0

    stages = range(plan.num_stages)
    backward, input_grad, weight_grad = ([median(kind, s) for s in stages] for kind in "BIW")
    split = {task.stage for task in tasks if task.kind == "I"}
    for s in stages:
        if s not in split:
            input_grad[s] = weight_grad[s] = backward[s] / 2
        elif backward[s] == 0:
            backward[s] = input_grad[s] + weight_grad[s]
    return Profile(
        forward=[median("F", s) for s in stages],
        backward=backward,
        latency=_latencies(plan, tasks),
        overhead=overhead,
        bandwidth=[math.inf] * len(boundaries),
        result_bytes=result_bytes,
        packed=[any(m.packed_nbytes > 0 for m in by_boundary[b]) for b in boundaries],
        input_grad=input_grad if split else None,
        weight_grad=weight_grad if split else None,
    )


def fastest(profiles: Sequence[Profile]) -> Profile:
    """The least of each figure: what disturbs a measurement makes it larger."""

    def least(name: str) -> list[float]:
        return [min(column) for column in zip(*(getattr(p, name) for p in profiles))]

    split = all(p.input_grad is not None for p in profiles)
    return Profile(
        forward=least("forward"),
        backward=least("backward"),
        latency=least("latency"),
        overhead=least("overhead"),
        bandwidth=profiles[0].bandwidth,
        result_bytes=profiles[0].result_bytes,
        packed=profiles[0].packed,
        input_grad=least("input_grad") if split else None,
        weight_grad=least("weight_grad") if split else None,
    )


def _mean_overhead(messages: Sequence[Messages]) -> float:
    count = sum(m.count for m in messages)
    return sum(m.seconds for m in messages) / count if count else 0.0


def _latencies(plan: _C.Plan, tasks: Sequence[TaskRecord]) -> list[float]:
    last_before: dict[int, TaskRecord] = {}  # what each task waits for longest
    for task in sorted(tasks, key=lambda task: task.end):
        last_before.update((after, task) for after in plan.successors(task.task))
    found: list[list[float]] = [[] for _ in range(plan.num_stages - 1)]
    idle_since: dict[tuple[int, str], float] = {}
    for task in tasks:
        worker = (task.rank, task.stream if plan.overlap else "")
        last = last_before.get(task.task)
        waited = last is not None and last.end >= idle_since.get(worker, 0.0)
        if waited and last.rank != task.rank:
            found[min(last.stage, task.stage)].append(task.begin - last.end)
        idle_since[worker] = task.end
    return [max(0.0, statistics.median(gaps)) if gaps else 0.0 for gaps in found]


@functools.cache
def packing_time(nbytes: int) -> float:
    """Seconds to pack so many bytes on the CPU, the least of five times."""
    import torch  # here, for plans of other costs need neither

    from ..packing import Layout, packer

    result = torch.empty(nbytes, dtype=torch.uint8)
    layout = Layout.of([result])
    buffer, packs = torch.empty_like(result), packer(layout, [result])
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        packs.pack(buffer)
        times.append(time.perf_counter() - begin)
    return min(times)
