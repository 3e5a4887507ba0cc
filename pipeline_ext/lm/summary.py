"""The results of a training run."""

import math
import statistics
from dataclasses import dataclass, field

from ..plan.schedule_choice import ScheduleChoice
from .metrics import StepMetrics


@dataclass
class Summary:
    """The results of a training run; ``--json`` writes what ``as_json`` returns.

    For a resumed run it covers the steps after ``resumed_after``: ``val_bpb_first`` is measured before them,
    ``loss_first`` is the loss of the first of them.
    """

    schedule: str
    stages: int
    microbatches: int
    bubble_predicted: float
    messages_per_step: int
    resumed_after: int = 0  # the step of the checkpoint; 0: a new run
    val_bpb_first: float = math.nan
    val_bpb_last: float = math.nan
    steps: list[StepMetrics] = field(default_factory=list)
    peak_in_flight: list[int] = field(default_factory=list)  # by rank
    bubble_simulated: float = math.nan  # with the stage times measured in the last step
    schedule_choice: ScheduleChoice | None = None  # with --schedule auto, once it is made: the last
    verified: str | None = None  # whether a step equals plain autograd
    seconds_since_choice: list[float] = field(default_factory=list)  # of each step of the pipeline

    def add_choice(self, choice: ScheduleChoice, seconds: float | None) -> None:
        """A step followed ``choice``, and took the pipeline so many seconds; None: it was not timed."""
        if choice is not self.schedule_choice:
            self.schedule_choice = choice
            self.seconds_since_choice.clear()
        if seconds is not None:
            self.seconds_since_choice.append(seconds)

    def as_json(self) -> dict:
        """Plain values; None if not measured."""
        ms = [s.step_ms for s in self.steps]
        values = {
            "schedule": self.schedule,
            "schedule_chosen": self.schedule_choice and self.schedule_choice.schedule,
            "pipeline_ms_predicted": self.pipeline_ms_predicted,
            "pipeline_ms_measured": self.pipeline_ms_measured,
            "stages": self.stages,
            "microbatches": self.microbatches,
            "resumed_after": self.resumed_after,
            "steps": len(self.steps),
            "loss_first": self.steps[0].loss if ms else None,
            "loss_last": self.steps[-1].loss if ms else None,
            "val_bpb_first": self.val_bpb_first,
            "val_bpb_last": self.val_bpb_last,
            "tokens_per_second": self.tokens_per_second,
            "step_ms": ({"min": min(ms), "median": statistics.median(ms), "max": max(ms)} if ms else None),
            "bubble_predicted": self.bubble_predicted,
            "bubble_simulated": self.bubble_simulated,
            "bubble_measured": self.bubble_measured,
            "messages_per_step": self.messages_per_step,
            "peak_in_flight": self.peak_in_flight,
            "verified": self.verified,
        }
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in values.items()
        }

    @property
    def pipeline_ms_predicted(self) -> float:
        """A step with the chosen schedule, predicted when it was chosen; without the optimizer's step."""
        return math.nan if self.schedule_choice is None else self.schedule_choice.predicted * 1e3

    @property
    def pipeline_ms_measured(self) -> float:
        """Median over the steps with the chosen schedule, without the optimizer's step."""
        return statistics.median(self.seconds_since_choice) * 1e3 if self.seconds_since_choice else math.nan

    @property
    def bubble_measured(self) -> float:
        """Median over the steps of the mean over ranks of 1 - busy time / step time."""
        measured = [s.bubble for s in self.steps if s.bubble is not None]
        return statistics.median(measured) if measured else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Mean over all steps, without validation."""
        if not self.steps:
            return math.nan
        tokens = sum(s.tokens_per_second * s.step_ms for s in self.steps)
        return tokens / sum(s.step_ms for s in self.steps)
