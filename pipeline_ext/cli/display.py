"""Shows a training run: a live bar on a terminal, plain lines elsewhere."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..lm.metrics import StepMetrics
from ..lm.summary import Summary

Show = Callable[[StepMetrics], None]
_PLAIN_LINES = 20  # per run, without a terminal


class Display:
    """Shows one training run; shows nothing if ``quiet``."""

    def __init__(self, summary: Summary, steps: int, quiet: bool = False) -> None:
        self._summary = summary
        self._steps = steps
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)

    def header(self, *, model: str, data: str, batch: str, ranks: str, devices: str) -> None:
        """Model, data, stages, devices, schedule, microbatches, predicted bubble."""
        table = Table.grid(padding=(0, 2))
        for name, value in (
            ("model", model),
            ("data", data),
            ("batch", batch),
            ("stages", f"{self._summary.stages} on {ranks}"),
            ("devices", devices),
            ("schedule", self._summary.schedule),
            ("bubble", f"{self._summary.bubble_predicted:.1%} predicted, if all stages cost the same"),
        ):
            table.add_row(name, value)
        if self._summary.resumed_after:
            table.add_row("resumed", f"after step {self._summary.resumed_after}")
        self._console.print(table)

    def validation(self, when: str, bits_per_byte: float) -> None:
        """One line for a validation."""
        self._console.print(f"validation {when}: {bits_per_byte:.3f} bits per byte")

    def note(self, text: str) -> None:
        """One line of text."""
        self._console.print(text, markup=False)

    def verified(self, sentence: str | None) -> None:
        """Prints whether a step equals plain autograd, if that was found out."""
        if sentence is not None:
            self._console.print(f"verified: {sentence}", markup=False)

    def stopped(self) -> None:
        """One line for Ctrl-C."""
        self._console.print("stopped by Ctrl-C")

    @contextlib.contextmanager
    def progress(self) -> Iterator[Show]:
        """Yields a function that shows the metrics of a step."""
        if not self._console.is_terminal:
            yield self._plain_line
            return
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as bar:
            task = bar.add_task("", total=self._steps, completed=self._summary.resumed_after)
            yield lambda m: bar.update(task, completed=m.step, description=_figures(m))

    def _plain_line(self, m: StepMetrics) -> None:
        every = max(1, self._steps // _PLAIN_LINES)
        done = self._summary.steps
        if m.step % every and len(done) > 1 and m.step != self._steps:
            return
        left = (self._steps - m.step) * sum(s.step_ms for s in done) / len(done) / 1e3
        self._console.print(f"step {m.step}/{self._steps}  {_figures(m)}  ETA {left:.0f} s")

    def closing_table(self, written: list[Path]) -> None:
        """The results of the run, and the files it wrote."""
        s = self._summary
        table = Table(show_header=False)
        for name, value in (
            (
                "steps",
                f"{s.resumed_after + len(s.steps)} of {self._steps}"
                + (f", resumed after {s.resumed_after}" if s.resumed_after else ""),
            ),
            (
                "validation, bits per byte",
                f"{_number(s.val_bpb_first, '.3f')} first, {_number(s.val_bpb_last, '.3f')} last",
            ),
            ("tokens/s", _number(s.tokens_per_second, ",.0f")),
            (
                "bubble",
                f"{s.bubble_predicted:.1%} predicted, "
                f"{_number(s.bubble_simulated, '.1%')} simulated from measured times, "
                f"{_number(s.bubble_measured, '.1%')} measured",
            ),
            ("schedule", _schedule(s)),
            ("messages per step", str(s.messages_per_step)),
            ("microbatches in flight, by rank", ", ".join(map(str, s.peak_in_flight))),
            ("files written", "\n".join(map(str, written))),
        ):
            table.add_row(name, value)
        self._console.print(table)


def _figures(m: StepMetrics) -> str:
    return f"loss {m.loss:.3f}  {m.bits_per_byte:.3f} bits per byte  {m.tokens_per_second:,.0f} tokens/s"


def _schedule(summary: Summary) -> str:
    if summary.schedule_choice is None:
        return summary.schedule
    predicted, measured = summary.pipeline_ms_predicted, summary.pipeline_ms_measured
    return (
        f"{summary.schedule_choice.schedule}, chosen by {summary.schedule}; a pipeline's step "
        f"{predicted:.1f} ms predicted, {_number(measured, '.1f')} ms measured"
    )


def _number(value: float, form: str) -> str:
    return "not measured" if math.isnan(value) else format(value, form)
