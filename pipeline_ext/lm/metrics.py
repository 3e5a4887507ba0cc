"""``metrics.jsonl``: a line for each training step."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..base.files import whole_file


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    loss: float  # nats per byte
    bits_per_byte: float
    tokens_per_second: float
    step_ms: float
    bubble: float | None  # None if the step's tasks were not timed
    learning_rate: float


def begin_log(log: Path, before: Path, step: int) -> None:
    """Writes to ``log`` the lines of ``before`` up to ``step``; a run that crashed may have later ones."""
    lines = before.read_bytes().splitlines(keepends=True) if before.exists() else []
    with whole_file(log) as file:
        file.writelines(line for line in lines if _step_of(line) <= step)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut short by a crash
