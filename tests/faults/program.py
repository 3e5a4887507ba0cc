"""The program that each process runs: a training that comes to every moment, with a fault at one of them."""

import atexit
import contextlib
import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from reference import reference_step
from torch import Tensor, nn

import pipeline_ext as pe

from . import injection, namespaces
from .cases import Case
from .injection import Moments

STEPS = 3
MICROBATCHES = 4
WIDTH = 4
RATE = 0.1
HUNG = "hung "  # begins the name of a file of threads
_TOGETHER = 30.0  # seconds that a fault waits for the others to be in the same call


@dataclass(frozen=True)
class Join:
    """Makes the process group of a case: the victim is on the second node, and one process has the store."""

    case: Case
    nodes: tuple[str, ...] | None  # names of their namespaces; None: all on loopback
    port: int

    def __call__(self, rank: int, size: int) -> None:
        node, of_host = (int(process == self.case.victim) for process in (rank, self.case.host))
        if self.nodes is not None:
            namespaces.enter(self.nodes[node])
        os.environ["GLOO_SOCKET_IFNAME"] = "lo" if self.nodes is None else namespaces.INTERFACE
        host = "127.0.0.1" if self.nodes is None else namespaces.address(of_host)
        limit = timedelta(seconds=60)
        store = dist.TCPStore(host, self.port, is_master=rank == self.case.host, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


@dataclass
class Raised:
    """An error that a process had, and when."""

    kind: str
    text: str
    at: float  # seconds of the monotonic clock


@dataclass
class Report:
    """What became of a process.

    Attributes:
        errors: in order; the last one ended the training, unless there are weights.
        weights: of its stage after the training.
        left: gradients that a failed step has left.
        went_on: whether a step after the last error was accepted.
    """

    errors: list[Raised] = field(default_factory=list)
    weights: dict[str, Tensor] | None = None
    left: int = 0
    went_on: bool = False

    def note(self, error: BaseException) -> None:
        text = " ".join([str(error), *getattr(error, "__notes__", [])])
        self.errors.append(Raised(type(error).__name__, text, time.monotonic()))


class Stage(nn.Linear):
    """A linear layer, whose passes are moments."""

    def __init__(self, phase: "Phase", moments: Moments) -> None:
        super().__init__(WIDTH, WIDTH)
        self.phase, self.moments = phase, moments

    def forward(self, x: Tensor) -> Tensor:
        self.phase.enter()
        weight = self.weight.clone()
        y = self.reach("F", F.linear(x, weight, self.bias))
        if y.requires_grad:
            weight.register_hook(lambda gradient: self.reach("W", gradient))
            y.register_hook(lambda gradient: self.reach("B", gradient))
        return y

    def reach(self, kind: str, value: Tensor) -> Tensor:
        return self.moments.reach(f"{self.phase.name} {kind}", value)


class Phase:
    """The call that a process is in, and whether the others are in it too."""

    def __init__(self, folder: Path) -> None:
        self.name = ""
        self._folder = folder

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        self.name = name
        yield
        self.name = ""

    def enter(self) -> None:
        (self._folder / f"{self.name} {dist.get_rank()}").touch()

    def all_are_in(self) -> bool:
        return all((self._folder / f"{self.name} {rank}").exists() for rank in range(dist.get_world_size()))


def live(case: Case, folder: Path, has_fault: bool, limit: float) -> Report:
    """Trains from the checkpoint in ``folder``, in a process of the group of a case.

    A process that has not ended within ``limit`` seconds says where it is, in the folder.
    """
    report = Report()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what runs in background
    with (folder / f"{HUNG}{dist.get_rank()}").open("w") as file:
        faulthandler.dump_traceback_later(limit, file=file)
        with contextlib.suppress(_Over):
            _train(case, folder, has_fault, report)
        atexit._run_exitfuncs()  # a process of a test has no exit of its own
        faulthandler.cancel_dump_traceback_later()
    return report


def _train(case: Case, folder: Path, has_fault: bool, report: Report) -> None:
    rank = dist.get_rank()
    phase = Phase(folder)
    is_victim = has_fault and rank == case.victim
    moments = Moments(
        case.reached if is_victim else None,
        _once_all_are_in(phase, getattr(injection, case.fault_function)),
        folder / "fired",
        case.times,
    )
    moments.watch_files({"x": "save", "r": "load"})
    limit = case.expected.timeout
    _limit_group(limit if has_fault else 60.0)
    with _noted(report):
        pipe = pe.Pipeline(
            [lambda: _stage(phase, moments), lambda: _stage(phase, moments)],
            None,
            MICROBATCHES,
            case.schedule,
            F.mse_loss,
            mesh=case.mesh(),
            timeout=limit if has_fault else 60.0,
            nonfinite=case.nonfinite,
        )
    with _noted(report, pipe):
        _steps(pipe, moments, phase, folder, report)
        moments.reach("close")
        pipe.close()
        moments.reach("exit")
    (stage,) = pipe.stage_modules
    report.weights = {name: p.detach().clone() for name, p in stage.named_parameters()}


def _steps(pipe: pe.Pipeline, moments: Moments, phase: Phase, folder: Path, report: Report) -> None:
    optimizer = torch.optim.SGD(pipe.parameters(), lr=RATE)

    def load() -> int:
        return pe.load_checkpoint(folder / "last", pipe, optimizer)["done"]

    def save() -> None:
        pe.save_checkpoint(folder / "last", pipe, optimizer, done=step + 1)

    done = _twice(load, folder, report)
    for step in range(done, STEPS):
        x, y = batch(step)
        with phase.of("first step" if step == 0 else "step"):
            _step(pipe, x, y, report)
        moments.reach("clip")
        pipe.clip_grad_norm_(1e9)  # which leaves them as they are
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            with phase.of("eval"):
                pipe.eval(x)
            moments.reach("gather_trace")
            pipe.gather_trace()
            _twice(save, folder, report)


def _step(pipe: pe.Pipeline, x: Tensor, y: Tensor, report: Report) -> None:
    """A step; once more if it was dropped."""
    try:
        pipe.step(x, target=y)
    except pe.NonFiniteError as error:
        report.note(error)
        report.left = sum(p.grad is not None for p in pipe.parameters())
        pipe.step(x, target=y)


def _twice(call, folder: Path, report: Report):
    """Calls once more what has failed in all processes, and has changed nothing."""
    try:
        return call()
    except pe.PeerError:
        raise
    except pe.PipelineError as error:
        report.note(error)
        injection.free_disk(folder)
        return call()


@contextlib.contextmanager
def _noted(report: Report, pipe: pe.Pipeline | None = None) -> Iterator[None]:
    """Notes the error that ends the training, and what it has left of ``pipe``."""
    try:
        yield
    except BaseException as error:
        report.note(error)
        if pipe is not None:
            _after(error, pipe, report)
        raise _Over from error


class _Over(Exception):
    """The training has ended with an error."""


def _after(error: BaseException, pipe: pe.Pipeline, report: Report) -> None:
    """Notes what a failure has left; one outside of a step leaves gradients as they are."""
    said = " ".join([str(error), *getattr(error, "__notes__", [])])
    if "every .grad of the model is None" in said:
        report.left = sum(p.grad is not None for p in pipe.parameters())
    if isinstance(error, pe.PipelineError) and not isinstance(error, pe.InvalidArgument):
        x, y = batch(0)
        try:
            pipe.step(x, target=y)
            report.went_on = True
        except pe.PipelineError:
            pass
    pipe.close()


def _stage(phase: Phase, moments: Moments) -> Stage:
    torch.manual_seed(0)
    stage = Stage(phase, moments)
    moments.reach("construct", stage)
    return stage


def _once_all_are_in(phase: Phase, inject: injection.Inject) -> injection.Inject:
    """``inject``, once all processes are in the step: one that is not is told of the failure before it."""

    def fault(value):
        until = time.monotonic() + _TOGETHER
        while phase.name and not phase.all_are_in() and time.monotonic() < until:
            time.sleep(0.01)
        return inject(value)

    return fault


def _limit_group(seconds: float) -> None:
    """Sets the timeout of the process group, which is that of checkpoints, once all have joined it."""
    dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout = timedelta(seconds=seconds)


def batch(step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(step)
    return tuple(torch.randn(8, WIDTH, generator=random) for _ in range(2))


def plain_training(folder: Path) -> list[dict[str, Tensor]]:
    """The weights, by stage, of the same training in plain autograd; saves its begin in ``folder``."""
    phase = Phase(folder)
    nothing = Moments(None, injection.hang, folder / "fired")
    stages = [_stage(phase, nothing), _stage(phase, nothing)]
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in stages))
    for plain, stage in zip(model, stages):
        plain.load_state_dict(stage.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    pe.save_checkpoint(folder / "last", model, optimizer, done=0)
    for step in range(STEPS):
        reference_step(model, *batch(step), MICROBATCHES, F.mse_loss)
        optimizer.step()
        optimizer.zero_grad()
    return [dict(layer.named_parameters()) for layer in model]
