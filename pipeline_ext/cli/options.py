"""The options of a training run: defaults, arguments, and what a resumed run takes over."""

import argparse
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgument
from ..lm import checkpoint
from ..lm.checkpoint import Checkpoint
from ..planning import schedule_names

_FIXED = ("batch", "context", "width", "layers", "heads", "seed")  # for all of a run
WIRES = ("none", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_NOT_SAVED = ("resume", "out", "json")  # a checkpoint does not say where to write


@dataclass(frozen=True)
class Options:
    """What a user may choose, with the defaults of a new run."""

    data: str | None = None
    steps: int = 480
    batch: int = 32
    context: int = 64
    stages: int = 2
    microbatches: int = 8
    schedule: str = "1f1b"
    overlap: bool = False
    pack: str = "1"
    pack_forward: str = "1"
    wire: str = "none"
    wire_forward: str = "none"
    width: int = 160
    layers: int = 4
    heads: int = 5
    learning_rate: float = 3e-3
    threads: int | None = None
    seed: int = 0
    checkpoint_every: int = 100
    resume: str | None = None
    out: str | None = None
    json: str | None = None

    def messages(self) -> dict[str, Any]:
        """How results are to leave the stages, as ``Pipeline`` takes it."""

        def pack(text: str) -> int | str:
            return text if text in ("all", "auto") else int(text)

        def wire(text: str) -> torch.dtype | None:
            return None if text == "none" else getattr(torch, text)

        return {
            "pack": pack(self.pack),
            "pack_forward": pack(self.pack_forward),
            "wire": wire(self.wire),
            "wire_forward": wire(self.wire_forward),
        }

    def to_save(self) -> dict:
        """What a checkpoint keeps."""
        kept = {key: value for key, value in asdict(self).items() if key not in _NOT_SAVED}
        if self.data is not None:
            kept["data"] = os.path.abspath(self.data)
        return kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an argument for each option. One not given is left out of the parsed namespace."""

    def add(flag: str, help: str, **settings) -> None:
        default = getattr(Options, flag[2:].replace("-", "_"))
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(flag, help=help + shown, default=argparse.SUPPRESS, **settings)

    add("--data", "file or folder to learn; none: Python's standard library", metavar="PATH")
    add("--steps", "training steps; the learning rate falls over all of them", type=_count)
    add("--batch", "rows of a batch", type=_count)
    add("--context", "bytes the model sees at once", type=_count)
    add("--stages", "stages to cut the model into", type=_count)
    add("--microbatches", "parts a batch is cut into", type=_count)
    add("--schedule", f"{', '.join(schedule_names())}, or a CSV file")
    add(
        "--overlap",
        "let a rank run forward and backward at once",
        action=argparse.BooleanOptionalAction,
    )
    packs = "a number up to --microbatches, all, or auto"
    add("--pack", f"how many microbatches' gradients leave in one message: {packs}", type=_pack, metavar="K")
    add("--pack-forward", "the same for activations", type=_pack, metavar="K")
    add("--wire", "type that gradients travel as", choices=WIRES)
    add("--wire-forward", "type that activations travel as", choices=WIRES)
    add("--width", "width of the model", type=_count)
    add("--layers", "blocks of the model", type=_count)
    add("--heads", "attention heads; must divide the width", type=_count)
    add("--learning-rate", "the highest learning rate", type=_positive)
    add("--threads", "intra-op threads of each rank; none: cores / ranks", type=_count)
    add("--seed", "of the initial weights and the batches", type=_count_or_zero)
    add(
        "--checkpoint-every",
        "steps between checkpoints; 0: only at the end and at Ctrl-C",
        metavar="STEPS",
        type=_count_or_zero,
    )
    add(
        "--resume",
        "go on with the run in this folder, or of this checkpoint file, as if it had never stopped. Options "
        "not given are the run's, --threads too. The data's bytes, "
        f"{', '.join('--' + name for name in _FIXED)} stay as they are; with other --steps, "
        "--learning-rate, --microbatches or --threads the losses differ from those of the run left alone",
        metavar="PATH",
    )
    add("--out", "folder to write to; none: runs/DATE-TIME, or that of the resumed run", metavar="DIR")
    add("--json", "also write the closing table there, as one JSON object", metavar="FILE")


def read_options(arguments: argparse.Namespace) -> tuple[Options, Checkpoint | None]:
    """The options of a run, and the checkpoint it goes on from.

    Raises InvalidArgument for options that do not go together, or not with the checkpoint.
    """
    names = {field.name for field in fields(Options)}
    given = {key: value for key, value in vars(arguments).items() if key in names}
    resumed = None
    options = Options()
    if "resume" in given:
        path = Path(given["resume"])
        path = path / checkpoint.NAME if path.is_dir() else path
        given["resume"] = str(path)
        resumed = checkpoint.read(path)
        saved = {key: value for key, value in resumed.options.items() if key in names}
        if not all(_has_type(getattr(Options, key), value) for key, value in saved.items()):
            raise InvalidArgument(f"the options in the checkpoint {str(path)!r} are damaged")
        options = Options(**saved)
        _check_fixed(options, given)
    options = replace(options, **given)
    if options.width % options.heads:
        raise InvalidArgument(f"--heads {options.heads} does not divide --width {options.width}")
    if options.batch < options.microbatches:
        raise InvalidArgument(
            f"--batch {options.batch} has too few rows for --microbatches {options.microbatches}"
        )
    if resumed is not None and resumed.step >= options.steps:
        raise InvalidArgument(
            f"the checkpoint {options.resume!r} is of step {resumed.step}, so nothing is left to do for "
            f"--steps {options.steps}; give more --steps to go on"
        )
    return options, resumed


def _check_fixed(saved: Options, given: dict) -> None:
    for name in _FIXED:
        was = getattr(saved, name)
        now = given.get(name, was)
        if now != was:
            raise InvalidArgument(
                f"--{name} is {was} in the checkpoint and {now} here, but a run keeps it to its end; "
                f"leave --{name} out, or start a new run without --resume"
            )


def _has_type(default: object, value: object) -> bool:
    if default is None:
        return value is None or isinstance(value, (int, str))
    return type(value) is type(default)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _pack(text: str) -> str:
    return text if text in ("all", "auto") else str(_count(text))


def _count(text: str) -> int:
    return _whole_number(text, 1)


def _count_or_zero(text: str) -> int:
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return value
