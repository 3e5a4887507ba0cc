"""The training loop, without a display: yields what happened step by step."""

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn

from ..base.files import whole_file
from ..errors import InvalidArgument
from ..pipeline import Pipeline
from ..plan.schedule_choice import ScheduleChoice
from . import interrupt
from .checkpoint import Checkpoint
from .corpus import Corpus
from .gpt import bits, loss_fn
from .team import Team
from .unsplit_state import UnsplitState

_VALIDATION_BATCHES = 12
_TIMED_STEPS = 4  # of graphs: two warm it up, the third captures it


@dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl."""

    step: int
    loss: float  # nats per byte
    bits_per_byte: float
    tokens_per_second: float
    step_ms: float
    bubble: float | None  # None of a step whose tasks were not timed
    learning_rate: float


@dataclass
class Summary:
    """What a training run came to; ``as_json`` is what ``--json`` writes.

    Of a resumed run it covers what came after step ``resumed_after``: ``val_bpb_first`` is measured there,
    ``loss_first`` is that of the next step, and times and bubbles are of the steps since.
    """

    schedule: str
    stages: int
    microbatches: int
    bubble_predicted: float
    messages_per_step: int
    resumed_after: int = 0  # the last step done before; 0: a new run
    val_bpb_first: float = math.nan
    val_bpb_last: float = math.nan
    steps: list[StepMetrics] = field(default_factory=list)
    peak_in_flight: list[int] = field(default_factory=list)  # by rank
    bubble_simulated: float = math.nan  # from the stage times measured in the last step
    schedule_choice: ScheduleChoice | None = None  # of --schedule auto, once it is made
    seconds_since_choice: list[float] = field(default_factory=list)  # of the pipeline's steps

    def as_json(self) -> dict:
        """Plain values, None for what was not measured."""
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
        }
        return {
            key: None if isinstance(value, float) and math.isnan(value) else value
            for key, value in values.items()
        }

    @property
    def pipeline_ms_predicted(self) -> float:
        """Of a step with the schedule chosen, as it was chosen."""
        return math.nan if self.schedule_choice is None else self.schedule_choice.predicted * 1e3

    @property
    def pipeline_ms_measured(self) -> float:
        """Median over the steps with the schedule chosen, without the optimizer's."""
        return statistics.median(self.seconds_since_choice) * 1e3 if self.seconds_since_choice else math.nan

    @property
    def bubble_measured(self) -> float:
        """Median over the steps of the mean over ranks of 1 - busy time / step time."""
        measured = [s.bubble for s in self.steps if s.bubble is not None]
        return statistics.median(measured) if measured else math.nan

    @property
    def tokens_per_second(self) -> float:
        """Over all steps, validation left out."""
        if not self.steps:
            return math.nan
        tokens = sum(s.tokens_per_second * s.step_ms for s in self.steps)
        return tokens / sum(s.step_ms for s in self.steps)


def begin_log(log: Path, before: Path, step: int) -> None:
    """Makes ``log`` the lines of ``before`` up to ``step``; a run that crashed may have added others."""
    lines = before.read_bytes().splitlines(keepends=True) if before.exists() else []
    with whole_file(log) as file:
        file.writelines(line for line in lines if _step_of(line) <= step)


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # cut short by a crash


class Training:
    """A model, its pipeline, its data and its optimizer.

    ``step`` counts the whole steps done. All that a checkpoint holds changes at the end of a step, which
    Ctrl-C cannot split: so ``checkpoint`` is right after a step that was stopped, too.
    """

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
        autocast: torch.dtype | None = None,
        team: Team | None = None,
    ) -> None:
        """``team``: the processes that share ``pipe``; None: there is only this one."""
        self.pipe = pipe
        self.team = team or Team()
        self.steps = steps
        self.step = 0
        self._stopped = False
        self._corpus = corpus
        self._batch = batch
        self._peak_rate = learning_rate
        self._generator = torch.Generator().manual_seed(seed)
        self._validation = corpus.validation(rows=32, batches=_VALIDATION_BATCHES)
        device = next(pipe.parameters()).device.type
        self._precision = functools.partial(
            torch.autocast, device, dtype=autocast or torch.bfloat16, enabled=autocast is not None
        )
        self._optimizer = torch.optim.AdamW(
            pipe.parameters(),
            lr=learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True if device == "cuda" else None,  # without: copies as large as the model
        )
        names = [name for name, _ in model.named_parameters()]
        self._state = UnsplitState(pipe, self._optimizer, names, self.team)
        self.summary = Summary(
            schedule=schedule,
            stages=pipe.num_stages,
            microbatches=pipe.microbatches,
            bubble_predicted=pipe.simulate().bubble,
            messages_per_step=pipe.plan.num_messages,
            peak_in_flight=[0] * pipe.plan.num_ranks,
        )
        self._remember_random_state()

    def checkpoint(self, options: dict) -> Checkpoint | None:
        """The state after the last whole step, in the first process; None in the others."""
        state = self._state.gather()
        if state is None:
            return None
        model, optimizer = state
        return Checkpoint(
            step=self.step,
            model=model,
            optimizer=optimizer,
            batches=self._batches,
            random=self._random,
            data=self._corpus.fingerprint,
            options=options,
            random_of_gpus=self._random_of_gpus,
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Takes over the state of ``checkpoint``; of a pipeline with any stages.

        Raises InvalidArgument if it is of other data, or does not fit the model.
        """
        if checkpoint.data != self._corpus.fingerprint:
            was = checkpoint.options.get("data") or "Python's standard library"
            raise InvalidArgument(
                f"--data is {was} in the checkpoint, and {self._corpus.name} here holds other bytes than "
                "that did; resume with the same data, or start a new run without --resume"
            )
        try:
            self._state.load(checkpoint.model, checkpoint.optimizer)
            self._generator.set_state(checkpoint.batches)
            torch.set_rng_state(checkpoint.random)
            if torch.cuda.is_initialized():
                for gpu, state in zip(range(torch.cuda.device_count()), checkpoint.random_of_gpus):
                    torch.cuda.set_rng_state(state, gpu)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InvalidArgument(
                f"the checkpoint does not fit the model that its options make: {error}"
            ) from error
        self.step = self.summary.resumed_after = checkpoint.step
        self._remember_random_state()

    def validate(self) -> float:
        """Bits per byte on the held-out data."""
        self._set_mode(training=False)
        losses = []
        for x, y in self._validation:
            with self._precision():
                logits = self.pipe.eval(x)
            if logits is not None:  # another process has the last stage
                losses.append(loss_fn(logits, y.to(logits.device)).item())
        self._set_mode(training=True)
        here = [statistics.fmean(losses)] if losses else [0.0]
        return bits(self.team.all_of(here).sum().item())

    def _set_mode(self, training: bool) -> None:
        for stage in self.pipe.stage_modules:
            stage.train(training)

    def run(self, log: Path, stops: Callable[[], bool] = lambda: False) -> Iterator[StepMetrics]:
        """Trains and yields after each step; appends a line to ``log`` for each.

        All processes end after the step in which ``stops()`` has been true in one of them.
        """
        with log.open("a") as lines:
            while self.step < self.steps and not self._stopped:
                yield self._train_one(lines, stops)

    def _train_one(self, log: TextIO, stops: Callable[[], bool]) -> StepMetrics:
        step = self.step + 1
        x, y = self._corpus.batch(self._batch, self._generator)
        begin = time.perf_counter()
        rate = self._learning_rate(step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.zero_grad()
        self.pipe.tracing = self._is_timed(step)
        with self._precision():
            loss: Tensor = self.pipe.step(x, target=y)
        self.pipe.clip_grad_norm_(1.0)
        with interrupt.deferred():
            self._optimizer.step()
            nats = loss.item()  # waits for the GPU
            seconds = time.perf_counter() - begin
            metrics = StepMetrics(
                step=step,
                loss=nats,
                bits_per_byte=bits(nats),
                tokens_per_second=x.numel() / seconds,
                step_ms=seconds * 1e3,
                bubble=self._hear_of_all(stops()),
                learning_rate=rate,
            )
            log.write(json.dumps(asdict(metrics)) + "\n")
            log.flush()
            self.step = step
            self._remember_random_state()
            self._add_to_summary(metrics)
        return metrics

    def _hear_of_all(self, stops: bool) -> float | None:
        """The step's bubble over all ranks, None if it was not timed. Notes what else they tell."""
        trace = self.pipe.trace if self.pipe.tracing else None
        found = self.team.all_of([stops] if trace is None else [stops, trace.bubble, *trace.peak_in_flight])
        self._stopped = bool(found[:, 0].any())
        if trace is None:
            return None
        peaks = zip(self.summary.peak_in_flight, found[:, 2:].amax(0).int().tolist())
        self.summary.peak_in_flight = [max(pair) for pair in peaks]
        return found[:, 1].mean().item()

    def _remember_random_state(self) -> None:
        """That of the last whole step: one that is stopped has drawn its batch already."""
        self._batches = self._generator.get_state()
        self._random = torch.get_rng_state()
        self._random_of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def _add_to_summary(self, metrics: StepMetrics) -> None:
        self.summary.steps.append(metrics)
        self.summary.messages_per_step = self.pipe.plan.num_messages
        self.summary.schedule_choice = self.pipe.schedule_choice
        if metrics.bubble is not None and self.pipe.schedule_choice is not None:
            self.summary.seconds_since_choice.append(self.pipe.trace.step_time)

    def _is_timed(self, step: int) -> bool:
        """A graph that takes times is another one, and slower: of graphs only the last are timed."""
        replays = self.pipe.graph is not None and self.pipe.graph.fallback is None
        return not replays or step > self.steps - _TIMED_STEPS

    def _learning_rate(self, step: int) -> float:
        """A linear rise over the first twentieth, then a cosine down to a tenth."""
        warmup = max(1, self.steps // 20)
        if step <= warmup:
            return self._peak_rate * step / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self._peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
