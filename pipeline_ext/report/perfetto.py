"""Writes a step as a Chrome trace, for ui.perfetto.dev and chrome://tracing."""

from collections.abc import Iterator, Sequence
from typing import Any

from .. import _C
from ..plan.costs import Costs
from ..plan.records import ReductionRecord, TaskRecord
from .memory_curve import memory_curve

Event = dict[str, Any]

_STREAMS = ("forward", "backward")


def chrome_trace(
    plan: _C.Plan,
    tasks: Sequence[TaskRecord],
    reductions: Sequence[ReductionRecord] = (),
    notes: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The contents of the JSON file. ``tasks`` are in seconds and sorted by begin.

    Each rank is a process and each of its streams a thread. Perfetto colours a task by its name without digits,
    which is its kind.
    """
    # Tasks come first, because an arrow binds to a task that was read before it.
    events = [*_names(plan), *_tasks(tasks), *_messages(plan, tasks), *_activations(plan, tasks)]
    events += _reductions(plan, reductions)
    return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": notes or {}}


def _track(rank: int, stream: str) -> Event:
    # No two ranks share a thread number, because some readers name threads by the number alone.
    return {"pid": rank, "tid": 2 * rank + 1 + _STREAMS.index(stream)}


def _names(plan: _C.Plan) -> Iterator[Event]:
    def about(what: str, track: Event, args: Event) -> Event:
        return {"ph": "M", "name": what, **track, "args": args}

    for rank in range(plan.num_ranks):
        process = _track(rank, "forward")
        yield about("process_name", process, {"name": f"rank {rank}"})
        yield about("process_sort_index", process, {"sort_index": rank})
        for index, stream in enumerate(_STREAMS):
            thread = _track(rank, stream)
            yield about("thread_name", thread, {"name": stream})
            yield about("thread_sort_index", thread, {"sort_index": index})


def _tasks(tasks: Sequence[TaskRecord]) -> Iterator[Event]:
    for record in tasks:
        args = {"stage": record.stage}
        if record.microbatch >= 0:
            args["microbatch"] = record.microbatch
        begin = _microseconds(record.begin)
        yield {
            "ph": "X",
            "name": record.action,
            "cat": record.kind,
            **_track(record.rank, record.stream),
            "ts": begin,
            "dur": round(_microseconds(record.end) - begin, 3),
            "args": args,
        }


def _messages(plan: _C.Plan, tasks: Sequence[TaskRecord]) -> Iterator[Event]:
    """An arrow for each dependency between ranks, from the end of a task to the begin of the next one."""
    by_task = {record.task: record for record in tasks}
    number = 0
    for before in tasks:
        for after in map(by_task.__getitem__, plan.successors(before.task)):
            if before.rank == after.rank:
                continue
            number += 1
            name = "activation" if before.stage < after.stage else "gradient"
            arrow = {"name": name, "cat": "message", "id": number}
            # Just before the end of the task: at the end the arrow would bind to no task.
            sent = _microseconds(max(before.begin, before.end - 1e-9))
            received = _microseconds(after.begin)
            yield {"ph": "s", **arrow, **_track(before.rank, before.stream), "ts": sent}
            yield {
                "ph": "f",
                **arrow,
                **_track(after.rank, after.stream),
                "ts": received,
                "bp": "e",
            }


def _activations(plan: _C.Plan, tasks: Sequence[TaskRecord]) -> Iterator[Event]:
    """How many microbatches each rank holds: from the begin of ``F`` to the end of ``B`` or ``W``."""
    each_takes_1 = Costs(act_memory=1)
    for rank, curve in sorted(memory_curve(tasks, each_takes_1, plan.num_stages).items()):
        track = _track(rank, "forward")
        for time, alive in {_microseconds(time): int(alive) for time, alive in curve}.items():
            yield {"ph": "C", "name": "activations", **track, "ts": time, "args": {"alive": alive}}


def _reductions(plan: _C.Plan, reductions: Sequence[ReductionRecord]) -> Iterator[Event]:
    """Below the rank that sent the buffer, as asynchronous events: several may overlap."""
    for number, record in enumerate(reductions):
        name = f"reduce stage {record.stage}" if record.stage >= 0 else "reduce tied parameters"
        rank = plan.rank_of_stage[max(record.stage, 0)]
        event = {"name": name, "cat": "reduction", "id": number, **_track(rank, "backward")}
        yield {"ph": "b", **event, "ts": _microseconds(record.begin), "args": {"bytes": record.nbytes}}
        yield {"ph": "e", **event, "ts": _microseconds(record.end)}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
