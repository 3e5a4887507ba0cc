"""The training loop, without a display: yields what happened step by step."""

import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..pipeline import Pipeline
from .corpus import Corpus
from .gpt import bits, loss_fn

_VALIDATION_BATCHES = 12


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    loss: float  # nats per byte
    bits_per_byte: float
    tokens_per_second: float
    step_ms: float
    bubble: float
    learning_rate: float


@dataclass
class Summary:
    """What a training run came to; ``as_json`` is what ``--json`` writes."""

    schedule: str
    stages: int
    microbatches: int
    bubble_predicted: float
    messages_per_step: int
    val_bpb_first: float = math.nan
    val_bpb_last: float = math.nan
    steps: list[StepMetrics] = field(default_factory=list)
    peak_in_flight: list[int] = field(default_factory=list)  # by rank
    bubble_simulated: float = math.nan  # from the stage times measured in the last step

    def as_json(self) -> dict:
        """Plain values, None for what was not measured."""
        ms = [s.step_ms for s in self.steps]
        values = {
            "schedule": self.schedule,
            "stages": self.stages,
            "microbatches": self.microbatches,
            "steps": len(self.steps),
            "loss_first": self.steps[0].loss if ms else None,
            "loss_last": self.steps[-1].loss if ms else None,
            "val_bpb_first": self.val_bpb_first,
            "val_bpb_last": self.val_bpb_last,
            "tokens_per_second": self.tokens_per_second,
            "step_ms": (
                {"min": min(ms), "median": statistics.median(ms), "max": max(ms)} if ms else None
            ),
            "bubble_predicted": self.bubble_predicted,
            "bubble_simulated": self.bubble_simulated,
            "bubble_measured": self.bubble_measured,
            "messages_per_step": self.messages_per_step,
            "peak_in_flight": self.peak_in_flight,
        }
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in values.items()
        }

    @property
    def bubble_measured(self) -> float:
        """Median over the steps of the mean over ranks of 1 - busy time / step time."""
        return statistics.median(s.bubble for s in self.steps) if self.steps else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Over all steps, validation left out."""
        if not self.steps:
            return math.nan
        tokens = sum(s.tokens_per_second * s.step_ms for s in self.steps)
        return tokens / sum(s.step_ms for s in self.steps)


class Training:
    """A model, its pipeline, its data and its optimizer."""

    def __init__(
        self,
        model: nn.Module,
        pipe: Pipeline,
        corpus: Corpus,
        *,
        schedule: str,
        steps: int,
        batch: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.pipe = pipe
        self.steps = steps
        self._model = model
        self._corpus = corpus
        self._batch = batch
        self._peak_rate = learning_rate
        self._generator = torch.Generator().manual_seed(seed)
        self._validation = corpus.validation(rows=32, batches=_VALIDATION_BATCHES)
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
        )
        self.summary = Summary(
            schedule=schedule,
            stages=pipe.num_stages,
            microbatches=pipe.microbatches,
            bubble_predicted=pipe.simulate().bubble,
            messages_per_step=pipe.plan.num_messages,
            peak_in_flight=[0] * pipe.plan.num_ranks,
        )

    def validate(self) -> float:
        """Bits per byte on the held-out data."""
        self._model.eval()
        losses = [loss_fn(self.pipe.eval(x), y).item() for x, y in self._validation]
        self._model.train()
        return bits(statistics.fmean(losses))

    def run(self, log: Path) -> Iterator[StepMetrics]:
        """Trains and yields after each step; writes a line of ``log`` for each."""
        with log.open("w") as lines:
            for step in range(1, self.steps + 1):
                metrics = self._train_one(step)
                self.summary.steps.append(metrics)
                lines.write(json.dumps(asdict(metrics)) + "\n")
                lines.flush()
                yield metrics

    def _train_one(self, step: int) -> StepMetrics:
        x, y = self._corpus.batch(self._batch, self._generator)
        begin = time.perf_counter()
        rate = self._learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        loss: Tensor = self.pipe.step(x, target=y)
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        seconds = time.perf_counter() - begin
        trace = self.pipe.trace
        self.summary.peak_in_flight = [
            max(a, b) for a, b in zip(self.summary.peak_in_flight, trace.peak_in_flight)
        ]
        return StepMetrics(
            step=step,
            loss=loss.item(),
            bits_per_byte=bits(loss.item()),
            tokens_per_second=x.numel() / seconds,
            step_ms=seconds * 1e3,
            bubble=trace.bubble,
            learning_rate=rate,
        )

    def _learning_rate(self, step: int) -> float:
        """A linear rise over the first twentieth, then a cosine down to a tenth."""
        warmup = max(1, self.steps // 20)
        if step <= warmup:
            return self._peak_rate * step / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self._peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
