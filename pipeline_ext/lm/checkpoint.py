"""A checkpoint file: all that a training run needs to go on as if it had never stopped.

Tensors, numbers and text in torch.save's format, read with ``weights_only``: reading never executes code.
(torch.distributed.checkpoint keeps its metadata as a pickle, which can; hence it is not used here.)
"""

import pickle
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.files import whole_file
from ..errors import InvalidArgument, PipelineError
from . import interrupt

NAME = "checkpoint.pt"  # in a run's folder
_FORMAT = "pipeline_ext checkpoint"
_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after a whole step."""

    step: int
    model: dict  # the unsplit model's state, by name
    optimizer: dict  # its state, by position among the unsplit model's parameters
    batches: Tensor  # state of the generator that draws the batches
    random: Tensor  # state of torch's own generator
    data: str  # fingerprint of the training data
    options: dict  # of the run, by name
    random_of_gpus: list  # states of the GPUs' generators, by number; empty: none was used


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint in place of the one at ``path``; a crash at any moment leaves one of the two.

    Raises PipelineError if it cannot be written; an earlier one is then unchanged.
    """
    values = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    try:
        # Deferred: torch.save would turn a KeyboardInterrupt inside it into a RuntimeError.
        with interrupt.deferred(), whole_file(path) as file:
            torch.save({"format": _FORMAT, "version": _VERSION, **values}, file)
    except RuntimeError as error:
        cause = error.__context__ or error  # what the disk said, which torch.save hides
        raise PipelineError(f"{str(path)!r} cannot be written: {cause}; what was there is unchanged") from error


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint file; no code in it is ever executed.

    Raises InvalidArgument if there is no such file, if it is no checkpoint or a damaged one, if it holds
    anything but tensors, numbers and text, or if it is of a newer format.
    """
    name = repr(str(path))
    not_ours = f"{name} is not a checkpoint of pipeline-ext train, or it is damaged or cut short"
    try:
        values = _load(path)
    except FileNotFoundError as error:
        raise InvalidArgument(f"there is no checkpoint {name}") from error
    except OSError as error:
        raise InvalidArgument(f"the checkpoint {name} cannot be read: {error}") from error
    except pickle.UnpicklingError as error:
        raise InvalidArgument(
            f"{name} was refused and nothing of it executed: it holds something other than tensors, "
            "numbers and text, which could run code when loaded"
        ) from error
    except Exception as error:
        raise InvalidArgument(not_ours) from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise InvalidArgument(not_ours)
    version = values.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise InvalidArgument(
            f"the checkpoint {name} has format {version} and this pipeline_ext reads formats up to "
            f"{_VERSION}; install the newer one that wrote it"
        )
    values = {"random_of_gpus": [], **values}  # those of earlier versions have none
    types = {field.name: field.type for field in fields(Checkpoint)}
    if not all(isinstance(values.get(key), kind) for key, kind in types.items()):
        raise InvalidArgument(not_ours)
    return Checkpoint(**{key: values[key] for key in types})


def _load(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:  # checksums, which torch.load does not look at
            raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", weights_only=True)
