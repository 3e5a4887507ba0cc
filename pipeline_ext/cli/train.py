"""``pipeline-ext train``: trains a byte-level GPT through a pipeline."""

import argparse
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..base.lock import locked
from ..checkpoint.together import together
from ..errors import DeadPipeline, InvalidArgument, InvalidSchedule, PipelineError
from ..lm import checkpoint, interrupt
from ..lm.corpus import Corpus
from ..lm.gpt import count_parameters, gpt, loss_fn
from ..lm.metrics import begin_log
from ..lm.team import Team
from ..lm.training import Training
from ..pipeline import Pipeline
from ..plan.simulation import simulate
from . import launch
from .display import Display
from .options import Options, add_arguments, dtype, read_options


def set_up(parser: argparse.ArgumentParser) -> None:
    """Describes the command and adds its options."""
    parser.description = (
        "Trains a byte-level GPT through a pipeline. By default it learns the source files of "
        "Python's standard library, in about two minutes on two cores. Under torchrun each process is one "
        "rank, on a CPU."
    )
    parser.set_defaults(run=run)
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    options, resumed = read_options(arguments, launch.processes())
    out = _folder(options)
    if options.json:
        summary_file = Path(options.json)
        summary_file.parent.mkdir(parents=True, exist_ok=True)
        if summary_file.is_dir():
            raise InvalidArgument(f"--json {options.json} is a folder; give the name of a file")
    with launch.team() as team, _held(out, team):
        return _run(options, resumed, out, team)


@contextlib.contextmanager
def _held(out: Path, team: Team) -> Iterator[None]:
    """Keeps other runs out of the folder. Raises PipelineError, in all processes, if one is in it."""
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    refusal = f"trains in {str(out)!r}; give another folder with --out, or wait until that run has ended"
    with contextlib.ExitStack() as held:
        with together("this run cannot start", alone=team.size == 1):
            if team.is_first:
                held.callback(_remove_empty, made)
                out.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(out / _LOCK, refusal))
        yield


def _remove_empty(folders: list[Path]) -> None:
    """Those that nothing was written to, from the innermost on."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _run(options: Options, resumed: checkpoint.Checkpoint | None, out: Path, team: Team) -> int:
    corpus = Corpus(options.data, options.context)
    torch.manual_seed(options.seed)
    model = gpt(context=options.context, width=options.width, layers=options.layers, heads=options.heads)
    with _pipeline(model, options, team) as pipe:
        threads = options.threads or _threads(pipe, team)
        options = replace(options, threads=threads)
        torch.set_num_threads(threads)
        training = Training(
            model,
            pipe,
            corpus,
            schedule=options.schedule,
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.learning_rate,
            seed=options.seed,
            autocast=dtype(options.autocast),
            team=team,
        )
        if resumed is not None:
            training.resume(resumed)
        parameters = count_parameters(model)
        del model  # each of several processes keeps its own stages only
        team.check_agreement({"the training data": corpus.fingerprint, "the last step": training.step})
        display = Display(training.summary, steps=options.steps, quiet=not team.is_first)
        display.header(
            model=f"GPT over bytes, {parameters / 1e6:.2f} M parameters "
            f"({options.layers} blocks, width {options.width})",
            data=f"{corpus.name}, {len(corpus.train) / 1e6:.1f} MB",
            batch=f"{options.batch} x {options.context} bytes in {options.microbatches} microbatches",
            ranks=f"{pipe.plan.num_ranks} ranks" + (", a process each" if team.size > 1 else ""),
            devices=_devices(pipe, options),
        )
        log = out / "metrics.jsonl"
        if team.is_first:
            begin_log(log, Path(options.resume).with_name(log.name) if options.resume else log, training.step)
        with interrupt.noted(team.size > 1) as stops:
            _train(training, log, display, options, stops)
        written = [log, out / checkpoint.NAME, *_save_last_step(training, out, display)]
    if not team.is_first:
        return 0
    if options.json:
        Path(options.json).write_text(json.dumps(training.summary.as_json(), indent=2) + "\n")
        written.append(Path(options.json))
    display.closing_table(written)
    return 0


_LOCK = ".running"  # in a run's folder
_VERIFIED_AFTER = 60.0  # seconds of training


def _pipeline(model: nn.Module, options: Options, team: Team) -> Pipeline:
    try:
        return Pipeline(
            model,
            num_stages=options.stages,
            microbatches=options.microbatches,
            schedule=options.schedule,
            loss_fn=loss_fn,
            mesh=team.group,
            **options.engine(team.size),
            **options.messages(),
        )
    except InvalidSchedule as error:
        if team.size == 1:
            raise
        raise InvalidSchedule(f"{error} (torchrun has started {team.size} processes, a rank each)") from error


def _threads(pipe: Pipeline, team: Team) -> int:
    """Intra-op threads of a rank, so that the ranks on this machine share its cores."""
    ranks_here = pipe.plan.num_ranks if team.size == 1 else launch.processes_here()
    return max(1, len(os.sched_getaffinity(0)) // ranks_here)


def _devices(pipe: Pipeline, options: Options) -> str:
    """The model's devices and how it computes, for display."""
    names = sorted({str(parameter.device) for parameter in pipe.parameters()})
    if options.autocast != "none":
        names.append(f"{options.autocast} autocast")
    return ", ".join([*names, "CUDA graphs"] if options.graphs else names)


def _save_last_step(training: Training, out: Path, display: Display) -> list[Path]:
    """Writes and simulates the last step of all processes; returns the written files."""
    written = [out / "trace.json", out / "timeline.png"]
    try:
        trace = training.pipe.gather_trace()
        if trace is None:
            return []
        training.summary.bubble_simulated = simulate(trace.plan, trace.profile().costs(trace.plan)).bubble
        for path in written:
            trace.save(path)
    except PipelineError as error:  # no step was run, no matplotlib, or a full disk
        display.note(str(error))
    return [path for path in written if path.exists()]


def _folder(options: Options) -> Path:
    """The folder to write to. Raises InvalidArgument if another run has its checkpoint there."""
    if options.out is not None:
        out = Path(options.out)
    elif options.resume is not None:
        out = Path(options.resume).parent
    else:
        out = Path(time.strftime("runs/%Y%m%d-%H%M%S"))
    file = out / checkpoint.NAME
    if file.exists() and not (options.resume and file.samefile(options.resume)):
        raise InvalidArgument(
            f"there is a checkpoint {str(file)!r} already; continue it by --resume {out}, or give another "
            "folder with --out"
        )
    return out


def _train(
    training: Training, log: Path, display: Display, options: Options, stops: Callable[[], bool]
) -> None:
    """Validates, trains, validates. Ctrl-C ends the training, a second one the last validation too.

    The training also ends after the step in which ``stops()`` is true in one of the processes.
    """
    summary, team = training.summary, training.team

    def save() -> None:
        state = training.checkpoint(options.to_save())
        if state is not None:
            checkpoint.write(log.with_name(checkpoint.NAME), state)

    try:
        summary.val_bpb_first = training.validate()
        display.validation("before", summary.val_bpb_first)
        with display.progress() as show:
            until_verified = _VERIFIED_AFTER
            for metrics in training.run(log if team.is_first else Path(os.devnull), stops):
                show(metrics)
                until_verified -= metrics.step_ms / 1e3
                if summary.verified is None and (until_verified <= 0 or metrics.step == training.steps):
                    summary.verified = training.verify()
                    display.verified(summary.verified)
                if options.checkpoint_every and metrics.step % options.checkpoint_every == 0:
                    save()
    except KeyboardInterrupt:
        if team.size > 1:
            raise  # the others cannot continue without this one
    try:
        save()
        if training.step < training.steps:
            display.stopped()
        if summary.steps:
            summary.val_bpb_last = training.validate()
            display.validation("after", summary.val_bpb_last)
    except (KeyboardInterrupt, DeadPipeline):  # the pipeline is dead after two Ctrl-C in one step
        if team.size > 1:
            raise
