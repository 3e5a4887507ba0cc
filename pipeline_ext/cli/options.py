"""The options of a training run: defaults, arguments, and what a resumed run takes from its checkpoint."""

import argparse
import os
import re
import sys
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

_FIXED = ("preset", "batch", "context", "width", "layers", "heads", "seed")  # for the whole run
WIRES = ("none", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
AUTOCASTS = ("none", "bfloat16")
_MOST_THREADS = 1024  # with a hundred times as many, torch's thread pool ends the process
_NOT_SAVED = ("resume", "out", "json")  # a checkpoint does not decide where to write
_IF_BEGUN = "auto"  # value of --resume: continue the run in --out, or start it


@dataclass(frozen=True)
class Options:
    """The options, with the defaults of a new run on the CPU."""

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
        """``Pipeline``'s arguments for where and how stages run; leaves out what ``Pipeline`` may choose."""
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
        """``Pipeline``'s arguments for messages between stages."""

        def pack(text: str) -> int | str:
            return text if text in ("all", "auto") else int(text)

        return {
            "pack": pack(self.pack),
            "pack_forward": pack(self.pack_forward),
            "wire": dtype(self.wire),
            "wire_forward": dtype(self.wire_forward),
        }

    def to_save(self) -> dict:
        """The options that a checkpoint keeps."""
        kept = {key: value for key, value in asdict(self).items() if key not in _NOT_SAVED}
        if self.data is not None:
            kept["data"] = os.path.abspath(self.data)
        return kept


def dtype(name: str) -> torch.dtype | None:
    """The type that an option names; None for "none"."""
    return None if name == "none" else getattr(torch, name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds an argument for each option. The parsed namespace holds only the options that were given."""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default=argparse.SUPPRESS,
        help="defaults for a machine: cpu, shown here; gpu-small for any GPU; gpu-medium for 24 GB of "
        "memory; h200 to fill an H200 (default: gpu-small on a GPU, else cpu)",
    )

    def add(flag: str, help: str, **settings: Any) -> None:
        default = getattr(Options, flag[2:].replace("-", "_"))
        shown = "" if default is None or default is False else f" (default: {default})"
        parser.add_argument(flag, help=help + shown, default=argparse.SUPPRESS, **settings)

    add("--data", "file or folder to train on; if not given, Python's standard library", metavar="PATH")
    add("--steps", "training steps; the learning rate falls until the last one", type=count)
    add("--batch", "rows per batch", type=count)
    add("--context", "bytes per row", type=count)
    add("--stages", "number of stages", type=count)
    add("--microbatches", "number of microbatches in a batch", type=count)
    add("--schedule", f"{', '.join(schedule_names())}, a CSV file, or {AUTO} to measure and choose")
    add(
        "--device",
        "cpu; cuda for all GPUs; cuda:0, cuda:1, ... for one; auto for all GPUs, or the CPU if there is none "
        "or under torchrun",
        type=_device,
    )
    add(
        "--overlap",
        "run forward and backward of a rank at the same time; if not given, only on GPUs",
        action=argparse.BooleanOptionalAction,
    )
    add(
        "--graphs",
        "capture the step in a CUDA graph (GPUs only)",
        action=argparse.BooleanOptionalAction,
    )
    add("--autocast", "type of matrix products", choices=AUTOCASTS)
    packs = "a number up to --microbatches, all, or auto"
    add("--pack", f"microbatches whose gradients are sent in one message: {packs}", type=_pack, metavar="K")
    add("--pack-forward", "the same for activations", type=_pack, metavar="K")
    add("--wire", "type in which gradients are sent", choices=WIRES)
    add("--wire-forward", "type in which activations are sent", choices=WIRES)
    add("--width", "width of the model", type=count)
    add("--layers", "number of blocks", type=count)
    add("--heads", "attention heads; must divide the width", type=count)
    add("--learning-rate", "peak learning rate", type=positive)
    add("--threads", "intra-op threads of each rank; if not given, cores / ranks", type=count)
    add("--seed", "seed of the initial weights and the batches", type=count_or_zero)
    add(
        "--checkpoint-every",
        "steps between checkpoints; 0 for only at the end and at Ctrl-C",
        metavar="STEPS",
        type=count_or_zero,
    )
    add(
        "--resume",
        "continue the run in this folder, or of this checkpoint file, as if it had never stopped. The run's "
        "own options are the defaults, --threads included. The data's bytes, "
        f"{', '.join('--' + name for name in _FIXED)} cannot change; another --steps, --learning-rate, "
        "--microbatches or --threads changes the losses. "
        f"{_IF_BEGUN}: continue the run in --out if it has a checkpoint, or start it; so the same command can "
        "be repeated, as torchrun does",
        metavar="PATH",
    )
    add(
        "--out",
        "folder to write to; if not given, runs/DATE-TIME, or the folder of the resumed run",
        metavar="DIR",
    )
    add("--json", "also write the closing table to this file, as one JSON object", metavar="FILE")


def read_options(arguments: argparse.Namespace, processes: int = 1) -> tuple[Options, Checkpoint | None]:
    """The options of a run in this many processes, and the checkpoint from which it continues.

    Raises InvalidArgument for options that contradict one another or the checkpoint.
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
        resumed, skipped = checkpoint.newest(path)
        if skipped:
            print(f"pipeline-ext: {skipped}", file=sys.stderr)
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
    if options.threads is not None and options.threads > _MOST_THREADS:
        raise InvalidArgument(
            f"--threads is {options.threads}; give from 1 to {_MOST_THREADS}, or leave it out for cores / ranks"
        )
    if options.width % options.heads:
        raise InvalidArgument(f"--heads {options.heads} does not divide --width {options.width}")
    if options.batch < options.microbatches:
        raise InvalidArgument(
            f"--batch {options.batch} has too few rows for --microbatches {options.microbatches}"
        )
    if resumed is not None and resumed.step >= options.steps and not if_begun:
        raise InvalidArgument(
            f"the checkpoint {options.resume!r} is of step {resumed.step}, so nothing is left to do for "
            f"--steps {options.steps}; give more --steps to continue"
        )
    return options, resumed


def _on_gpu(device: str) -> bool:
    return device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())


def _begun(out: str | None) -> str | None:
    """The checkpoint of the run in this folder; None if there is none yet."""
    if out is None:
        raise InvalidArgument(
            f"--resume {_IF_BEGUN} continues the run in --out, which is not given; give --out DIR, too"
        )
    path = Path(out) / checkpoint.NAME
    return str(path) if path.exists() else None


def _check_device(options: Options, processes: int) -> None:
    if processes > 1 and options.device != "cpu":
        raise InvalidArgument(
            f"--device is {options.device}, and train runs the {processes} processes of torchrun on CPUs only; "
            "give --device cpu, or start the command without torchrun"
        )
    if options.device.startswith("cuda"):
        gpus = torch.cuda.device_count()
        if int(options.device.partition(":")[2] or 0) >= gpus:
            raise InvalidArgument(
                f"--device is {options.device} and torch sees {gpus} GPUs; give another, or --device auto to "
                "run on what this machine has"
            )
    if options.graphs and not _on_gpu(options.device):
        raise InvalidArgument("--graphs needs a GPU, and this run is on the CPU; give --no-graphs")


def _check_fixed(saved: Options, given: dict) -> None:
    for name in _FIXED:
        was = getattr(saved, name)
        now = given.get(name, was)
        if now != was:
            raise InvalidArgument(
                f"--{name} is {was} in the checkpoint and {now} here, but it cannot change within a run; "
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
