"""The checkpoint file of ``pipeline-ext train``: all that a run needs to continue as if it had never stopped.

Holds tensors, numbers and text in torch.save's format: one file, which one process writes, unlike the folders
of ``pipeline_ext.save_checkpoint``. Reading checks every byte and never executes code. The file that was
replaced stays, for a run whose newest one is damaged.
"""

import contextlib
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..base.files import whole_file
from ..errors import InvalidArgument, PipelineError
from . import interrupt

NAME = "checkpoint.pt"  # in a run's folder
_BEFORE = "{}.before"  # the one that a file of this name has replaced
_FORMAT = "pipeline_ext checkpoint"
_VERSION = 1


@dataclass(frozen=True)
class Checkpoint:
    """A run's state after a completed step."""

    step: int
    model: dict  # the unsplit model's state, by name
    optimizer: dict  # its state, by the parameter's position in the unsplit model
    batches: Tensor  # state of the generator that draws the batches
    random: Tensor  # state of torch's default generator
    data: str  # fingerprint of the training data
    options: dict  # of the run, by name
    random_of_gpus: list  # states of the GPUs' generators, by index; empty if no GPU was used


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Replaces the checkpoint at ``path``; a crash at any moment leaves the old one or the new one.

    Keeps the old one beside it, where the file system allows a second name. Raises PipelineError if it cannot
    be written; the old one is then unchanged.
    """
    values = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    try:
        # Ctrl-C has to wait: torch.save turns a KeyboardInterrupt into a RuntimeError.
        with interrupt.deferred(), _kept(path), whole_file(path) as file:
            torch.save({"format": _FORMAT, "version": _VERSION, **values}, file)
    except RuntimeError as error:
        cause = error.__context__ or error  # the system's error, which torch.save hides
        raise PipelineError(f"{str(path)!r} cannot be written: {cause}; what was there is unchanged") from error


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    """Keeps the file that the block replaces."""
    old = path.with_name(f".{path.name}.old")
    old.unlink(missing_ok=True)  # left by a crash
    with contextlib.suppress(OSError):
        os.link(path, old)
    try:
        yield
        if old.exists():
            os.replace(old, path.with_name(_BEFORE.format(path.name)))
    finally:
        old.unlink(missing_ok=True)


def newest(path: Path) -> tuple[Checkpoint, str]:
    """The checkpoint at ``path``, or if that is damaged the one before, and then a sentence that says so.

    Raises as ``read`` does.
    """
    try:
        return read(path), ""
    except _Damaged as damaged:
        before = path.with_name(_BEFORE.format(path.name))
        try:
            found = read(before)
        except InvalidArgument:
            raise damaged from None
        return found, f"{damaged}; the run continues from the one before, {str(before)!r} of step {found.step}"


class _Damaged(InvalidArgument):
    """A file that is no whole checkpoint."""


def read(path: Path) -> Checkpoint:
    """Reads a checkpoint file without executing code.

    Raises InvalidArgument if there is no such file, if it is damaged or no checkpoint, if it holds anything but
    tensors, numbers and text, or if its format is newer.
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
        raise _Damaged(not_ours) from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise _Damaged(not_ours)
    version = values.get("version")
    if isinstance(version, int) and version > _VERSION:
        raise InvalidArgument(
            f"the checkpoint {name} has format {version} and this pipeline_ext reads formats up to "
            f"{_VERSION}; install the newer one that wrote it"
        )
    values = {"random_of_gpus": [], **values}  # earlier versions wrote none
    types = get_type_hints(Checkpoint)
    if not all(isinstance(values.get(key), kind) for key, kind in types.items()):
        raise _Damaged(not_ours)
    return Checkpoint(**{key: values[key] for key in types})


def _load(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        if archive.testzip() is not None:  # checksums, which torch.load does not check
            raise zipfile.BadZipFile
    return torch.load(path, map_location="cpu", weights_only=True)
