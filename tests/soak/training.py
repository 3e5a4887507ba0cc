"""A process that trains for long beside plain autograd, with all that goes wrong in a program."""

import copy
import os
import random
import signal
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference import reference_step
from torch import nn

import pipeline_ext as pe

from .slopes import Sample, used_now

WIDTH, LAYERS = 32, 8
SAMPLES = 120  # at most, of a run
CALM = {"nothing": 80, "pause": 10, "save": 5, "restart": 5}
FAILURES = {"error": 5, "interrupt": 5}
SCHEDULES = ("gpipe", "1f1b", "zb-h1", "interleaved-1f1b", "zbv")


@dataclass
class Course:
    """What a process went through.

    Attributes:
        steps: how many returned a loss.
        wrong: those of which the loss or a gradient was not plain autograd's.
        events: how often each happened.
    """

    steps: int = 0
    wrong: list[str] = field(default_factory=list)
    events: Counter = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)


class Layer(nn.Module):
    """A layer that runs ``spring``, once, in its next forward or backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.spring, self.forwards = None, True

    def forward(self, x):
        self._pass(forwards=True)
        y = torch.tanh(self.linear(x))
        if y.requires_grad:
            y.register_hook(lambda grad: self._pass(forwards=False))
        return y

    def _pass(self, forwards: bool) -> None:
        if self.spring is not None and self.forwards == forwards:
            spring, self.spring = self.spring, None
            spring()


class Trained:
    """A model trained by a pipeline, and its twin in plain autograd."""

    def __init__(self, chance: random.Random, folder: Path) -> None:
        self.chance, self.path = chance, folder / "last"
        self.together = dist.is_initialized()
        self.ranks = dist.get_world_size() if self.together else 2
        torch.manual_seed(chance.randrange(2**31))
        self.model = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.twin = copy.deepcopy(self.model)
        self.twin_optimizer = _optimizer(self.twin.parameters())
        self.pipe: pe.Pipeline | None = None
        self.make()
        if self.path.exists():
            for model, optimizer in ((self.pipe, self.optimizer), (self.twin, self.twin_optimizer)):
                pe.load_checkpoint(self.path, model, optimizer)
        self.save()

    def make(self) -> None:
        """Another pipeline of the model; its parameters are to be loaded."""
        if self.pipe is not None:
            self.pipe.close()
        schedule = self.chance.choice(SCHEDULES)
        stages = self.ranks * (2 if schedule in ("interleaved-1f1b", "zbv") else 1)
        self.pipe = pe.Pipeline(
            self.model,
            num_stages=stages,
            microbatches=self.chance.randint(1, 4) * self.ranks,
            schedule=schedule,
            overlap=self.chance.random() < 0.3,
            pack=self.chance.choice((1, 1, "all")) if schedule == "gpipe" else 1,
            loss_fn=F.mse_loss,
            timeout=60,
            mesh=dist.group.WORLD if self.together else None,
            devices=None if self.together else ["cpu"] * self.ranks,
        )
        self.optimizer = _optimizer(self.pipe.parameters())

    def save(self) -> None:
        pe.save_checkpoint(self.path, self.pipe, self.optimizer)
        self._saved = copy.deepcopy((self.twin.state_dict(), self.twin_optimizer.state_dict()))

    def restart(self) -> None:
        """Goes on from the checkpoint with another pipeline."""
        self.make()
        pe.load_checkpoint(self.path, self.pipe, self.optimizer)
        model, optimizer = copy.deepcopy(self._saved)
        self.twin.load_state_dict(model)
        self.twin_optimizer.load_state_dict(optimizer)

    def step(self, event: str) -> tuple[str, float, float] | None:
        """A step with the event inside: what was wrong with it, its processor time, and plain autograd's.

        None if it failed, as it may with this event.
        """
        rows = self.pipe.microbatches + self.chance.randrange(4)
        x, y = torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)
        self.model.zero_grad()
        begin = time.process_time()
        loss = self._eventful(event, x, y)
        middle = time.process_time()
        if not self.all(loss is not None):
            self.model.zero_grad()
            return None
        self.twin.zero_grad()
        expected = reference_step(self.twin, x, y, self.pipe.microbatches, F.mse_loss)
        end = time.process_time()
        wrong = [] if torch.equal(loss, expected) else ["the loss"]
        own = {id(parameter) for parameter in self.pipe.parameters()}
        for (name, parameter), twin in zip(self.model.named_parameters(), self.twin.parameters()):
            here = parameter.grad is not None and torch.equal(parameter.grad, twin.grad)
            if id(parameter) in own and not here:
                wrong.append(name)
        self.optimizer.step()
        self.twin_optimizer.step()
        return ", ".join(wrong), middle - begin, end - middle

    def _eventful(self, event: str, x, y):
        """The loss; None if the step failed, which only an error or an interrupt may cause."""
        layer = self.chance.choice(self.model)
        delay, layer.forwards = self.chance.random() / 50, self.chance.random() < 0.5
        # A process that comes late to a step that has failed elsewhere finds a dead pipeline.
        elsewhere = (pe.PeerError, *([pe.DeadPipeline] if self.together else []))
        allowed = {
            "error": (pe.StageError, *elsewhere),
            "interrupt": (KeyboardInterrupt, *elsewhere),
        }.get(event, ())
        try:
            layer.spring = {"pause": lambda: time.sleep(delay), "error": _fail, "interrupt": _press}.get(event)
            loss = self.pipe.step(x, target=y)
            if event == "interrupt":
                time.sleep(0.2)  # pressed in the last task, it may come when the step has ended
            return loss
        except allowed:
            return None
        finally:
            layer.spring = None

    def all(self, fine: bool) -> bool:
        """Whether it is so in all processes."""
        if not self.together:
            return fine
        dist.all_reduce(found := torch.tensor(int(fine)), dist.ReduceOp.MIN)
        return bool(found)


def train(seconds: float, seed: int, folder: str, failures: bool) -> Course:
    """Trains for so long, from the checkpoint in ``folder`` if there is one. All processes call it together.

    ``failures``: whether steps fail. After one a process alone goes on; of several each returns.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    chance = random.Random(seed)
    trained, course = Trained(chance, Path(folder)), Course()
    begin, until_sample = time.monotonic(), 0.0
    ratios: list[float] = []
    events = CALM | FAILURES if failures else CALM
    while trained.all((now := time.monotonic() - begin) < seconds):
        (event,) = chance.choices(list(events), events.values())
        course.events[event] += 1
        if event == "save":
            trained.save()
        elif event == "restart":
            trained.save()
            trained.restart()
        stepped = trained.step(event)
        if stepped is None and trained.together:
            break
        if stepped is None:
            trained.restart()
            continue
        wrong, took, plain = stepped
        course.steps += 1
        if wrong:
            course.wrong.append(f"step {course.steps} with {event}: {wrong}")
        if event == "nothing":
            ratios.append(took / plain)
        if now >= until_sample and ratios:
            course.samples.append(used_now(now, statistics.median(ratios)))
            ratios.clear()
            until_sample = now + seconds / SAMPLES
    trained.pipe.close()
    return course


def _optimizer(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=False)


def _fail() -> None:
    raise ValueError("the error of a stage")


def _press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
