"""Times of tasks and messages, measured in a step."""

import functools
import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .. import _C
from .costs import Costs
from .records import Messages, TaskRecord


@dataclass(frozen=True)
class Profile:
    """Measured times of stages and messages, in seconds.

    Attributes:
        forward, backward: ``F`` and ``B`` of one microbatch without the time of its messages, by stage; medians
            over the step. For a stage that ran ``I`` and ``W``, ``B`` is their sum.
        input_grad, weight_grad: the same for ``I`` and ``W``; for a stage that ran ``B``, half of it each. None
            if all stages ran ``B``.
        latency: time from the end of a task to the begin of a task on another rank that waited for it, by
            boundary; median of both directions.
        overhead: time that a message takes its sender, by boundary.
        bandwidth: bytes per second of the link, by boundary; infinite if messages are passed by reference.
        result_bytes: bytes of the first microbatch's result, by boundary.
        packed: whether the stages' times include packing, by boundary.
        act_memory: bytes that a stage keeps for a microbatch, the most of the step, by stage; None: not
            measured. ``Pipeline(in_flight="auto")`` measures them in its first step.
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
    act_memory: list[int] | None = None

    def costs(self, plan: _C.Plan | None = None) -> Costs:
        """The costs of ``plan``; None: of a plan that packs nothing.

        If it packs results that the measured step passed by reference, the time of packing is measured now.
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
            act_memory=self.act_memory,
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes the costs of a plan that packs nothing, in seconds.

        ``Costs.load`` and ``pipeline-ext plan --costs`` read the file. Raises PipelineError if it cannot be
        written.
        """
        self.costs().save(path)


def profile(
    plan: _C.Plan,
    tasks: Sequence[TaskRecord],
    messages: Sequence[Messages],
    act_memory: list[int] | None = None,
) -> Profile:
    """The profile of one step; ``act_memory``: as in Profile."""
    boundaries = range(plan.num_stages - 1)
    by_boundary = {b: [m for m in messages if m.boundary == b and m.skip is None] for b in boundaries}
    overhead = [_mean_overhead(by_boundary[b]) for b in boundaries]
    result_bytes = [max((m.result_nbytes for m in by_boundary[b]), default=0) for b in boundaries]

    times: dict[tuple[str, int], list[float]] = {}
    for task, seconds in times_without_messages(plan, tasks, overhead):
        times.setdefault((task.kind, task.stage), []).append(seconds)

    def median(kind: str, stage: int) -> float:
        return max(0.0, statistics.median(times.get((kind, stage), [0.0])))

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
        act_memory=act_memory,
    )


def times_without_messages(
    plan: _C.Plan, tasks: Sequence[TaskRecord], overhead: Sequence[float]
) -> Iterator[tuple[TaskRecord, float]]:
    """Each task and its seconds, less ``overhead`` (by boundary) for each message that it sends."""
    for task in tasks:
        boundary = task.stage if task.kind == "F" else task.stage - 1
        sends = plan.num_messages_of(task.task)
        yield task, task.end - task.begin - (sends * overhead[boundary] if sends else 0.0)


def fastest(profiles: Sequence[Profile]) -> Profile:
    """The least of each figure, because disturbances only make a time longer."""

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
    last_before: dict[int, TaskRecord] = {}  # task -> the last to end of the tasks that it waits for
    for task in sorted(tasks, key=lambda task: task.end):
        last_before.update((after, task) for after in plan.successors(task.task))
    found: list[list[float]] = [[] for _ in range(plan.num_stages - 1)]
    idle_since: dict[tuple[int, str], float] = {}
    for task in tasks:
        worker = (task.rank, task.stream if plan.overlap else "")
        last = last_before.get(task.task)
        if last is not None and last.end >= idle_since.get(worker, 0.0) and last.rank != task.rank:
            found[min(last.stage, task.stage)].append(task.begin - last.end)
        idle_since[worker] = task.end
    return [max(0.0, statistics.median(gaps)) if gaps else 0.0 for gaps in found]


@functools.cache
def packing_time(nbytes: int) -> float:
    """Seconds to pack ``nbytes`` on the CPU: the least of five measurements."""
    import torch  # here, because planning at given costs needs neither

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
