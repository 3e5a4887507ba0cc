"""``pipeline-ext train``: trains a byte-level GPT through a pipeline."""

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..errors import DeadPipeline, InvalidArgument, PipelineError
from ..lm import checkpoint
from ..lm.corpus import Corpus
from ..lm.gpt import count_parameters, gpt, loss_fn
from ..lm.training import Training, begin_log
from ..pipeline import Pipeline
from .display import Display
from .options import Options, add_arguments, dtype, read_options


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a byte-level GPT on text",
        description="Trains a byte-level GPT through a pipeline. By default it learns the source files of "
        "Python's standard library, in about two minutes on two cores or on a GPU.",
    )
    parser.set_defaults(run=run)
    add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    options, resumed = read_options(arguments)
    out = _folder(options)
    if options.json:
        summary_file = Path(options.json)
        summary_file.parent.mkdir(parents=True, exist_ok=True)
        if summary_file.is_dir():
            raise InvalidArgument(f"--json {options.json} is a folder; give the name of a file")
    corpus = Corpus(options.data, options.context)
    torch.manual_seed(options.seed)
    model = gpt(
        context=options.context, width=options.width, layers=options.layers, heads=options.heads
    )
    with Pipeline(
        model,
        num_stages=options.stages,
        microbatches=options.microbatches,
        schedule=options.schedule,
        loss_fn=loss_fn,
        **options.engine(),
        **options.messages(),
    ) as pipe:
        cores = len(os.sched_getaffinity(0))
        options = replace(
            options, threads=options.threads or max(1, cores // pipe.plan.num_ranks)
        )
        torch.set_num_threads(options.threads)
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
        )
        if resumed is not None:
            training.resume(resumed)
        out.mkdir(parents=True, exist_ok=True)
        log = out / "metrics.jsonl"
        begin_log(log, Path(options.resume).with_name(log.name) if resumed else log, training.step)
        display = Display(training.summary, steps=options.steps)
        display.header(
            model=f"GPT over bytes, {count_parameters(model) / 1e6:.2f} M parameters "
            f"({options.layers} blocks, width {options.width})",
            data=f"{corpus.name}, {len(corpus.train) / 1e6:.1f} MB",
            batch=f"{options.batch} x {options.context} bytes in {options.microbatches} microbatches",
            ranks=pipe.plan.num_ranks,
            devices=_devices(model, options),
        )
        _train(training, log, display, options)
        written = [log, out / checkpoint.NAME, *_save_last_step(pipe, out, display)]
    if options.json:
        summary_file.write_text(json.dumps(training.summary.as_json(), indent=2) + "\n")
        written.append(summary_file)
    display.closing_table(written)
    return 0


def _devices(model: nn.Module, options: Options) -> str:
    """Where the model is and how it computes, for people."""
    names = sorted({str(parameter.device) for parameter in model.parameters()})
    if options.autocast != "none":
        names.append(f"{options.autocast} autocast")
    return ", ".join([*names, "CUDA graphs"] if options.graphs else names)


def _save_last_step(pipe: Pipeline, out: Path, display: Display) -> list[Path]:
    """Writes what the last step did; returns the files."""
    written = [out / "trace.json", out / "timeline.png"]
    try:
        for path in written:
            pipe.trace.save(path)
    except PipelineError as error:  # no step, no matplotlib, or no room
        display.note(str(error))
    return [path for path in written if path.exists()]


def _folder(options: Options) -> Path:
    """Where the run writes. Raises InvalidArgument rather than write over another run's checkpoint."""
    if options.out is None and options.resume is not None:
        out = Path(options.resume).parent
    else:
        out = Path(options.out or time.strftime("runs/%Y%m%d-%H%M%S"))
    file = out / checkpoint.NAME
    if file.exists() and not (options.resume and file.samefile(options.resume)):
        raise InvalidArgument(
            f"there is a checkpoint {str(file)!r} already; go on with it by --resume {out}, or give "
            "another folder with --out"
        )
    return out


def _train(training: Training, log: Path, display: Display, options: Options) -> None:
    """Validates, trains, validates; Ctrl-C ends the training, a second one the last validation too."""
    summary = training.summary

    def save() -> None:
        checkpoint.write(log.with_name(checkpoint.NAME), training.checkpoint(options.to_save()))

    try:
        summary.val_bpb_first = training.validate()
        display.validation("before", summary.val_bpb_first)
        with display.progress() as show:
            for metrics in training.run(log):
                show(metrics)
                if options.checkpoint_every and metrics.step % options.checkpoint_every == 0:
                    save()
    except KeyboardInterrupt:
        pass
    try:
        save()
        if training.step < training.steps:
            display.stopped()
        if summary.steps:
            if summary.steps[-1].bubble is not None:
                summary.bubble_simulated = training.pipe.simulate().bubble
            summary.val_bpb_last = training.validate()
            display.validation("after", summary.val_bpb_last)
    except (KeyboardInterrupt, DeadPipeline):  # dead: two Ctrl-C in one step
        pass
