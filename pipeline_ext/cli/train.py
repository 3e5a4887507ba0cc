"""``pipeline-ext train``: trains a byte-level GPT through a pipeline."""

import argparse
import json
import os
import time
from pathlib import Path

import torch

from ..errors import InvalidArgument
from ..lm.corpus import Corpus
from ..lm.gpt import count_parameters, gpt, loss_fn
from ..lm.training import Training
from ..pipeline import Pipeline
from ..planning import schedule_names
from .display import Display


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser(
        "train",
        help="train a byte-level GPT on text",
        description="Trains a byte-level GPT through a pipeline. By default it learns the source files of "
        "Python's standard library, in about two minutes on two cores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("--data", metavar="PATH", help="file or folder to learn; none: Python's standard library")
    add("--steps", type=_count, default=480, help="training steps")
    add("--batch", type=_count, default=32, help="rows of a batch")
    add("--context", type=_count, default=64, help="bytes the model sees at once")
    add("--stages", type=_count, default=2, help="stages to cut the model into")
    add("--microbatches", type=_count, default=8, help="parts a batch is cut into")
    add("--schedule", default="1f1b", help=f"{', '.join(schedule_names())}, or a CSV file")
    add("--overlap", action="store_true", help="let a rank run forward and backward at once")
    add("--width", type=_count, default=160, help="width of the model")
    add("--layers", type=_count, default=4, help="blocks of the model")
    add("--heads", type=_count, default=5, help="attention heads; must divide the width")
    add("--learning-rate", type=float, default=3e-3, help="the highest learning rate")
    add("--threads", type=_count, help="intra-op threads of each rank; none: cores / ranks")
    add("--seed", type=int, default=0, help="of the initial weights and the batches")
    add("--out", metavar="DIR", help="where to write metrics.jsonl; none: runs/DATE-TIME")
    add("--json", metavar="FILE", help="also write the closing table there, as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit status."""
    if options.width % options.heads:
        raise InvalidArgument(f"--heads {options.heads} does not divide --width {options.width}")
    if options.batch < options.microbatches:
        raise InvalidArgument(
            f"--batch {options.batch} has too few rows for --microbatches {options.microbatches}"
        )
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
        overlap=options.overlap,
    ) as pipe:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(options.threads or max(1, cores // pipe.plan.num_ranks))
        training = Training(
            model,
            pipe,
            corpus,
            schedule=options.schedule,
            steps=options.steps,
            batch=options.batch,
            learning_rate=options.learning_rate,
            seed=options.seed,
        )
        out = Path(options.out or time.strftime("runs/%Y%m%d-%H%M%S"))
        out.mkdir(parents=True, exist_ok=True)
        display = Display(training.summary, steps=options.steps)
        display.header(
            model=f"GPT over bytes, {count_parameters(model) / 1e6:.2f} M parameters "
            f"({options.layers} blocks, width {options.width})",
            data=f"{corpus.name}, {len(corpus.train) / 1e6:.1f} MB",
            batch=f"{options.batch} x {options.context} bytes in {options.microbatches} microbatches",
            ranks=pipe.plan.num_ranks,
        )
        _train(training, out / "metrics.jsonl", display)
    written = [out / "metrics.jsonl"]
    if options.json:
        written.append(Path(options.json))
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        written[-1].write_text(json.dumps(training.summary.as_json(), indent=2) + "\n")
    display.closing_table(written)
    return 0


def _train(training: Training, log: Path, display: Display) -> None:
    """Validates, trains, validates; Ctrl-C ends the training, a second one the last validation too."""
    summary = training.summary
    try:
        summary.val_bpb_first = training.validate()
        display.validation("before", summary.val_bpb_first)
        with display.progress() as show:
            for metrics in training.run(log):
                show(metrics)
    except KeyboardInterrupt:
        display.stopped()
    try:
        if summary.steps:
            summary.bubble_simulated = training.pipe.simulate().bubble
            summary.val_bpb_last = training.validate()
            display.validation("after", summary.val_bpb_last)
    except KeyboardInterrupt:
        pass


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value
