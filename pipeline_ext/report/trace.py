"""The trace of one step: when each task ran, on which rank and stream."""

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from functools import cached_property

from .. import _C
from ..base.files import whole_file
from ..plan.first_steps import Choice
from ..plan.pack_choice import PackChoice
from ..plan.profile import Profile, profile
from ..plan.records import Messages, ReductionRecord, ReductionTimes, StepRecord, TaskRecord, task_records
from ..plan.schedule_choice import ScheduleChoice
from ..plan.simulation import simulate
from .panel import Panel, percent, simulated_panel
from .perfetto import chrome_trace
from .timeline import SUFFIXES, accepted_path, save_picture


class Trace:
    """What one step did.

    Attributes:
        plan: the plan that the step followed.
        record: when the step and its tasks ran, in nanoseconds of the steady clock.
        peak_in_flight: most microbatches alive at once, by rank.
        peak_in_flight_of_stage: the same by stage.
        messages: the messages across each boundary between ranks, by direction.
        act_memory: the most bytes that a stage kept for a microbatch, by stage; None: not measured.
        reductions: the buffers of gradients averaged over replicas, in the order in which they were sent.
        pack_choice: what ``pack="auto"`` chose, once it has.
        schedule_choice: what ``schedule="auto"`` chose, once it has.
    """

    def __init__(
        self,
        plan: _C.Plan,
        record: StepRecord,
        messages: Sequence[Messages] = (),
        choice: Choice | None = None,
    ) -> None:
        self.plan = plan
        self.record = record
        self.messages = list(messages)
        self.pack_choice = choice if isinstance(choice, PackChoice) else None
        self.schedule_choice = choice if isinstance(choice, ScheduleChoice) else None
        self.peak_in_flight = list(record.peak_by_rank)
        self.peak_in_flight_of_stage = list(record.peak_by_stage)
        self.reductions: list[ReductionRecord] = []
        self.act_memory: list[int] | None = None

    def __repr__(self) -> str:
        return f"<Trace: {len(self.plan)} tasks in {self.step_time * 1e3:.1f} ms, bubble {self.bubble:.1%}>"

    @cached_property
    def step_time(self) -> float:
        """Seconds from the step's begin to its end. On a GPU, reading any time waits for the end."""
        return (self.record.end - self.record.begin) * 1e-9

    @cached_property
    def tasks(self) -> list[TaskRecord]:
        """The tasks that ran in this process, or in all for ``gather_trace``, sorted by begin."""
        zero = self.record.begin
        begin, end = (
            [(time - zero) * 1e-9 for time in times] for times in (self.record.task_begin, self.record.task_end)
        )
        records = task_records(self.plan, begin, end)
        return [record for record in records if self.record.task_end[record.task]]

    def add_reductions(self, times: Iterable[ReductionTimes]) -> None:
        """Sets ``reductions``."""
        zero = self.record.begin
        records = [
            ReductionRecord(stage, (begin - zero) * 1e-9, (end - zero) * 1e-9, nbytes)
            for stage, begin, end, nbytes in times
        ]
        self.reductions = sorted(records, key=lambda record: record.begin)

    def order(self) -> dict[int, list[str]]:
        """Rank -> its actions as text, in the order in which they began."""
        order: dict[int, list[str]] = {rank: [] for rank in range(self.plan.num_ranks)}
        for record in self.tasks:
            order[record.rank].append(record.action)
        return order

    @cached_property
    def busy(self) -> list[float]:
        """Seconds in which each rank ran at least one task."""
        busy = [0.0] * self.plan.num_ranks
        covered = [0.0] * self.plan.num_ranks
        for record in self.tasks:
            busy[record.rank] += max(0.0, record.end - max(record.begin, covered[record.rank]))
            covered[record.rank] = max(covered[record.rank], record.end)
        return busy

    @property
    def bubble_by_rank(self) -> list[float]:
        """Share of the step in which each rank ran nothing; 1 for a rank of another process."""
        return [1.0 - busy / self.step_time for busy in self.busy]

    @property
    def bubble(self) -> float:
        """Mean of ``bubble_by_rank`` over the ranks of this process."""
        here = {record.rank for record in self.tasks}
        return statistics.fmean(b for rank, b in enumerate(self.bubble_by_rank) if rank in here)

    def profile(self) -> Profile:
        """The measured times of stages and messages, and the memory of activations if that was measured."""
        return profile(self.plan, self.tasks, self.messages, self.act_memory)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the step to a file. The suffix decides the format:

        - ``.json``: a Chrome trace, for ui.perfetto.dev.
        - ``.png``, ``.svg``, ``.pdf``: a timeline of the step, and above it the plan's, simulated with the
          times measured in this step. Needs matplotlib.

        Makes the folders above the file. Raises InvalidArgument for another suffix, PipelineError without
        matplotlib or if the file cannot be written.
        """
        target = accepted_path(path, (".json", *SUFFIXES))
        if target.suffix.lower() == ".json":
            choices = {"pack_choice": self.pack_choice, "schedule_choice": self.schedule_choice}
            notes = {name: str(choice) for name, choice in choices.items() if choice is not None}
            with whole_file(target) as file:
                contents = chrome_trace(self.plan, self.tasks, self.reductions, notes)
                file.write(json.dumps(contents).encode())
            return
        planned = simulate(self.plan, self.profile().costs(self.plan))
        panels = [
            simulated_panel(
                f"Plan, simulated with the times measured below: bubble {percent(planned.bubble)}", planned
            ),
            Panel(
                f"Measured step: bubble {percent(self.bubble)}",
                self.plan,
                self.tasks,
                self.step_time,
                self.bubble_by_rank,
            ),
        ]
        unit, units = ("s", 1.0) if self.step_time >= 10 else ("ms", 1e3)
        save_picture(target, panels, unit, units)
