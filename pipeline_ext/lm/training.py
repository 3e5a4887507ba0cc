"""The training loop, without a display: yields the metrics of each step."""

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument, PipelineError
from ..pipeline import Pipeline
from . import interrupt
from .checkpoint import Checkpoint
from .corpus import Corpus
from .gpt import bits, loss_fn
from .metrics import StepMetrics
from .summary import Summary
from .team import Team
from .unsplit_state import UnsplitState

_VALIDATION_BATCHES = 12
_TIMED_STEPS = 4  # with CUDA graphs: two warm the timed graph up, the third captures it


class Training:
    """A model, its pipeline, its data and its optimizer.

    ``step`` counts completed steps. The state that a checkpoint holds changes only at the end of a step, which
    Ctrl-C cannot interrupt. So ``checkpoint`` is consistent after an interrupted step too.
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
        """``team`` are the processes that share ``pipe``; None: only this one."""
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
            fused=True if device == "cuda" else None,  # the default makes copies as large as the model
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
        """The state after the last completed step, in the first process; None in the others."""
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
        """Loads ``checkpoint``, which a pipeline with any number of stages has written.

        Raises InvalidArgument if it was trained on other data, or does not fit the model.
        """
        if checkpoint.data != self._corpus.fingerprint:
            was = checkpoint.options.get("data") or "Python's standard library"
            raise InvalidArgument(
                f"--data is {was} in the checkpoint, and {self._corpus.name} here holds other bytes; "
                "resume with the same data, or start a new run without --resume"
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
        losses = []
        for x, y in self._validation:
            with self._precision():
                logits = self.pipe.eval(x)
            if logits is not None:  # this process has the last stage
                losses.append(loss_fn(logits, y.to(logits.device)).item())
        here = [statistics.fmean(losses)] if losses else [0.0]
        return bits(self.team.all_of(here).sum().item())

    def verify(self) -> str | None:
        """Whether a step equals plain autograd, in a sentence; None on GPUs, and with several processes."""
        if self.team.size > 1 or self.pipe.devices[0].type != "cpu":
            return None
        x, y = self._validation[0]
        with self._precision():
            report = self.pipe.verify(x[: self._batch], target=y[: self._batch])
        return report.summary()

    def run(self, log: Path, stops: Callable[[], bool] = lambda: False) -> Iterator[StepMetrics]:
        """Trains; yields the metrics of each step and appends them to ``log``.

        All processes end after the step in which ``stops()`` is true in one of them.
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
            loss = self.pipe.step(x, target=y)
        assert isinstance(loss, Tensor)  # the outputs were not asked for
        norm = self.pipe.clip_grad_norm_(1.0)
        self._check_finite(step, loss, norm)
        with interrupt.deferred():
            self._optimizer.step()
            nats = loss.item()  # synchronizes with the GPU
            seconds = time.perf_counter() - begin
            metrics = StepMetrics(
                step=step,
                loss=nats,
                bits_per_byte=bits(nats),
                tokens_per_second=x.numel() / seconds,
                step_ms=seconds * 1e3,
                bubble=self._gather_figures(stops()),
                learning_rate=rate,
            )
            log.write(json.dumps(asdict(metrics)) + "\n")
            log.flush()
            self.step = step
            self._remember_random_state()
            self._add_to_summary(metrics)
        return metrics

    def _check_finite(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Raises PipelineError, in all processes, before the weights change. It waits for the GPU."""
        for what, value in (("loss", loss.item()), ("norm of the gradients", norm.item())):
            if not math.isfinite(value):
                raise PipelineError(
                    f"the {what} is {value} in step {step}, so the training has stopped, and the weights and "
                    f"the checkpoint are those of step {self.step} or before; give a lower "
                    "--learning-rate, or look at the data"
                )

    def _gather_figures(self, stops: bool) -> float | None:
        """Shares figures with the other processes; returns the bubble over all ranks, None if not timed."""
        trace = self.pipe.trace if self.pipe.tracing else None
        found = self.team.all_of([stops] if trace is None else [stops, trace.bubble, *trace.peak_in_flight])
        self._stopped = bool(found[:, 0].any())
        if trace is None:
            return None
        peaks = zip(self.summary.peak_in_flight, found[:, 2:].amax(0).int().tolist())
        self.summary.peak_in_flight = [max(pair) for pair in peaks]
        return found[:, 1].mean().item()

    def _remember_random_state(self) -> None:
        """Remembers it at the end of a step: a step that is interrupted has drawn its batch already."""
        self._batches = self._generator.get_state()
        self._random = torch.get_rng_state()
        self._random_of_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def _add_to_summary(self, metrics: StepMetrics) -> None:
        self.summary.steps.append(metrics)
        self.summary.messages_per_step = self.pipe.plan.num_messages
        if self.pipe.schedule_choice is not None:
            timed = metrics.bubble is not None
            self.summary.add_choice(self.pipe.schedule_choice, self.pipe.trace.step_time if timed else None)

    def _is_timed(self, step: int) -> bool:
        """With CUDA graphs only the last steps: a timed step needs a graph of its own, a slower one."""
        replays = self.pipe.graph is not None and self.pipe.graph.fallback is None
        return not replays or step > self.steps - _TIMED_STEPS

    def _learning_rate(self, step: int) -> float:
        """Rises linearly over the first twentieth of the steps, then falls along a cosine to a tenth."""
        warmup = max(1, self.steps // 20)
        if step <= warmup:
            return self._peak_rate * step / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return self._peak_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))
