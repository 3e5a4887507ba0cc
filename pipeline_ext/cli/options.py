"""The options of a training run: defaults, arguments, and what a resumed run takes over."""

import argparse
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import InvalidArgument
from ..lm import checkpoint
from ..lm.checkpoint import Checkpoint
from ..plan import zero_bubble
from ..plan.build import AUTO, build_plan, schedule_names
from .numbers import count, count_or_zero, positive
from .presets import PRESETS

_FIXED = ("preset", "batch", "context", "width", "layers", "heads", "seed")  # for all of a run
WIRES = ("none", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
AUTOCASTS = ("none", "bfloat16")
_NOT_SAVED = ("resume", "out", "json")  # a checkpoint does not say where to write
_IF_BEGUN = "auto"  # in place of what --resume goes on from


@dataclass(frozen=True)
class Options:
    """What a user may choose, with the defaults of a new run on the CPU."""

    preset: str = "cpu"
    device: str = "auto"
    graphs: bool = False
    autocast: str = "none"
    data: str | None = None
    steps: int = 480
    batch: int = 32
    context: int = 64
    stages: int = 2
    microbatches: int = 8
    schedule: str = "1f1b"
    overlap: bool | None = None
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

    def engine(self, processes: int = 1) -> dict[str, Any]:
        """Where and how the stages are to run, as ``Pipeline`` takes it; what it may choose is left out."""
        settings: dict[str, Any] = {}
        if self.device not in ("auto", "cuda") and processes == 1:
            settings["devices"] = [self.device] * self._ranks()
        if self.overlap is not None:
            settings["overlap"] = self.overlap
        if self.graphs:
            settings["graphs"] = True
        return settings

    def _ranks(self) -> int:
        if self.schedule in (AUTO, zero_bubble.NAME):
            return self.stages
        return build_plan(self.schedule, num_stages=self.stages, microbatches=self.microbatches).num_ranks

    def messages(self) -> dict[str, Any]:
        """How results are to leave the stages, as ``Pipeline`` takes it."""

        def pack(text: str) -> int | str:
            return text if text in ("all", "auto") else int(text)

        return {
            "pack": pack(self.pack),
            "pack_forward": pack(self.pack_forward),
            "wire": dtype(self.wire),
            "wire_forward": dtype(self.wire_forward),
        }

    def to_save(self) -> dict:
        """What a checkpoint keeps."""
        kept = {key: value for key, value in asdict(self).items() if key not in _NOT_SAVED}
        if self.data is not None:
            kept["data"] = os.path.abspath(self.data)
        return kept


def dtype(name: str) -> torch.dtype | None:
    """The type that an option names."""
    return None if name == "none" else getattr(torch, name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an argument for each option. One not given is left out of the parsed namespace."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=argparse.SUPPRESS,
        help="defaults for a machine: cpu, as shown here; gpu-small for any GPU; gpu-medium for one of 24 GB; "
        "h200 to fill an H200 (default: gpu-small on a GPU, else cpu)",
    )

    def add(flag: str, help: str, **settings) -> None:
        default = getattr(Options, flag[2:].replace("-", "_"))
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(flag, help=help + shown, default=argparse.SUPPRESS, **settings)

    add("--data", "file or folder to learn; none: Python's standard library", metavar="PATH")
    add("--steps", "training steps; the learning rate falls over all of them", type=count)
    add("--batch", "rows of a batch", type=count)
    add("--context", "bytes the model sees at once", type=count)
    add("--stages", "stages to cut the model into", type=count)
    add("--microbatches", "parts a batch is cut into", type=count)
    add("--schedule", f"{', '.join(schedule_names())}, a CSV file, or {AUTO}: measured and chosen")
    add("--device", "auto: all GPUs, else the CPU; cpu; cuda: all GPUs; cuda:0, cuda:1, ...: one", type=_device)
    add(
        "--overlap",
        "let a rank run forward and backward at once; not given: on GPUs",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--graphs",
        "on a GPU, capture the step in a CUDA graph and launch it as one",
        action=argparse.BooleanOptionalAction,
    )
    add("--autocast", "type that matrix products are computed in", choices=AUTOCASTS)
    packs = "a number up to --microbatches, all, or auto"
    add("--pack", f"how many microbatches' gradients leave in one message: {packs}", type=_pack, metavar="K")
    add("--pack-forward", "the same for activations", type=_pack, metavar="K")
    add("--wire", "type that gradients travel as", choices=WIRES)
    add("--wire-forward", "type that activations travel as", choices=WIRES)
    add("--width", "width of the model", type=count)
    add("--layers", "blocks of the model", type=count)
    add("--heads", "attention heads; must divide the width", type=count)
    add("--learning-rate", "the highest learning rate", type=positive)
    add("--threads", "intra-op threads of each rank; none: cores / ranks", type=count)
    add("--seed", "of the initial weights and the batches", type=count_or_zero)
    add(
        "--checkpoint-every",
        "steps between checkpoints; 0: only at the end and at Ctrl-C",
        metavar="STEPS",
        type=count_or_zero,
    )
    add(
        "--resume",
        "go on with the run in this folder, or of this checkpoint file, as if it had never stopped. Options "
        "not given are the run's, --threads too. The data's bytes, "
        f"{', '.join('--' + name for name in _FIXED)} stay as they are; with other --steps, "
        "--learning-rate, --microbatches or --threads the losses differ from those of the run left alone. "
        f"{_IF_BEGUN}: with the run in --out if it has a checkpoint there, or else begin one: so a command can "
        "be given again as it is, as torchrun does",
        metavar="PATH",
    )
    add("--out", "folder to write to; none: runs/DATE-TIME, or that of the resumed run", metavar="DIR")
    add("--json", "also write the closing table there, as one JSON object", metavar="FILE")


def read_options(arguments: argparse.Namespace, processes: int = 1) -> tuple[Options, Checkpoint | None]:
    """The options of a run of so many processes, and the checkpoint it goes on from.

    Raises InvalidArgument for options that do not go together, or not with the checkpoint.
    """
    names = {field.name for field in fields(Options)}
    given = {key: value for key, value in vars(arguments).items() if key in names}
    if processes > 1 and given.get("device", "auto") == "auto":
        given["device"] = "cpu"
    resumed = None
    if_begun = given.get("resume") == _IF_BEGUN
    if if_begun:
        given["resume"] = _begun(given.get("out"))
    if given.get("resume") is not None:
        path = Path(given["resume"])
        path = path / checkpoint.NAME if path.is_dir() else path
        given["resume"] = str(path)
        resumed = checkpoint.read(path)
        saved = {key: value for key, value in resumed.options.items() if key in names}
        if not all(_has_type(getattr(Options, key), value) for key, value in saved.items()):
            raise InvalidArgument(f"the options in the checkpoint {str(path)!r} are damaged")
        options = Options(**saved)
        _check_fixed(options, given)
    else:
        preset = given.get("preset", "gpu-small" if _on_gpu(given.get("device", "auto")) else "cpu")
        options = Options(preset=preset, **PRESETS[preset])
    options = replace(options, **given)
    _check_device(options, processes)
    if options.width % options.heads:
        raise InvalidArgument(f"--heads {options.heads} does not divide --width {options.width}")
    if options.batch < options.microbatches:
        raise InvalidArgument(
            f"--batch {options.batch} has too few rows for --microbatches {options.microbatches}"
        )
    if resumed is not None and resumed.step >= options.steps and not if_begun:
        raise InvalidArgument(
            f"the checkpoint {options.resume!r} is of step {resumed.step}, so nothing is left to do for "
            f"--steps {options.steps}; give more --steps to go on"
        )
    return options, resumed


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _begun(out: str | None) -> str | None:
    """The checkpoint of the run in this folder; None: there is none yet."""
    if out is None:
        raise InvalidArgument(
            f"--resume {_IF_BEGUN} goes on with the run in --out, which is not given; give --out DIR, too"
        )
    path = Path(out) / checkpoint.NAME
    return str(path) if path.exists() else None


def _check_device(options: Options, processes: int) -> None:
    if processes > 1 and options.device != "cpu":
        raise InvalidArgument(
            f"--device is {options.device}, and {processes} processes can share a pipeline on CPUs so far; "
            "give --device cpu, or start the command without torchrun"
        )
    if options.device.startswith("cuda"):
        gpus = torch.cuda.device_count()
        if int(options.device.partition(":")[2] or 0) >= gpus:
            raise InvalidArgument(
                f"--device is {options.device} and torch sees {gpus} GPUs; give another, or --device auto to "
                "run on what there is"
            )
    if options.graphs and not _on_gpu(options.device):
        raise InvalidArgument("--graphs needs a GPU, and this run is on the CPU; give --no-graphs")


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


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d*))?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of auto, cpu, cuda, cuda:0, cuda:1, ...")
    return text


def _pack(text: str) -> str:
    return text if text in ("all", "auto") else str(count(text))
