"""Checkpoints in the format of torch.distributed.checkpoint, under the names of the unsplit model.

Because of the names, each process finds what it needs however the model was cut when it was saved.
"""

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..base.files import folder_at, put_folder, whole_file
from ..errors import InvalidArgument
from . import optimizer_state
from .together import together
from .unsplit import LOSS, UnsplitModel

_EXTRA = "extra.pt"


def save_checkpoint(
    path: str | os.PathLike,
    model: UnsplitModel | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    **extra: Any,
) -> None:
    """Saves the state of model and optimizer, and ``extra``, as a folder that replaces the one at ``path``.

    All processes of torch.distributed call it together, each with its own stages and an optimizer of their
    parameters; all need access to the folder. State that several processes hold is written once. A crash at any
    moment leaves the old checkpoint or the new one. Example::

        pe.save_checkpoint("run/last", pipe, optimizer, step=step, rates=scheduler.state_dict())

    Args:
        path: the folder to write.
        model: a Pipeline, or a plain module.
        optimizer: an optimizer of ``model.parameters()`` or some of them.
        extra: values made of tensors, numbers, text, lists and dicts. Those of process 0 are written.

    Raises:
        InvalidArgument: the optimizer has other parameters or nested state, ``extra`` holds other values, or
            ``path`` is not a checkpoint. Nothing has been written.
        PipelineError: the checkpoint cannot be written, or a step is running. The old checkpoint is unchanged.
    """
    path = Path(os.path.realpath(path))
    what = f"the checkpoint {str(path)!r} cannot be written"
    with together(what):
        _check_target(path)
        packed = _packed(extra)
        with _at_rest(model, "save_checkpoint was called") as module:
            state = dict(module.state_dict())
        if optimizer is not None:
            state |= optimizer_state.by_name(optimizer, optimizer_state.names(model, optimizer))
    with together(what):
        save(state, storage_writer=_WholeWriter(path, packed))


def load_checkpoint(
    path: str | os.PathLike,
    model: UnsplitModel | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Copies in what ``save_checkpoint`` has written; the model may be cut in another way, or not at all.

    All processes of torch.distributed call it together. Load only checkpoints that you trust:
    torch.distributed.checkpoint stores values that are not tensors as a pickle, which can run code.

    Args:
        path: the folder to read.
        model: a Pipeline, or a plain module.
        optimizer: an optimizer of ``model.parameters()`` or some of them.

    Returns:
        The ``extra`` that was saved.

    Raises:
        InvalidArgument: there is no checkpoint; names or shapes in it differ from the model's; or the groups of
            the optimizer differ. Nothing has changed.
        PipelineError: the checkpoint cannot be read, or a step is running.
    """
    path = Path(os.path.realpath(path))
    what = f"the checkpoint {str(path)!r} cannot be loaded"
    with together(what):
        folder = folder_at(path)
        if folder is None:
            raise InvalidArgument("there is none")
        reader = FileSystemReader(folder)
        extra_file = folder / _EXTRA  # torch.distributed.checkpoint alone does not write one
        extra = torch.load(extra_file, weights_only=True) if extra_file.exists() else {}
        with _at_rest(model, "load_checkpoint was called") as module:
            state = module.state_dict()
        names = {} if optimizer is None else optimizer_state.names(model, optimizer)
        kept = optimizer_state.room_for(reader.read_metadata().state_dict_metadata, names)
    with together(what):
        load(kept, storage_reader=reader)
    with together(what):
        optimizer_dict = {} if optimizer is None else optimizer_state.positional(optimizer, names, kept)
    loaded = dict(state)
    with together(what):
        load(loaded, storage_reader=reader, planner=_StrictPlanner())
    state.update(loaded)
    with _at_rest(model, "load_checkpoint was called") as module:
        module.load_state_dict(state)
    if optimizer is not None:
        optimizer.load_state_dict(optimizer_dict)
    return extra


def _at_rest(model: UnsplitModel | nn.Module, what: str) -> contextlib.AbstractContextManager[nn.Module]:
    """The module to save, with the loss function if that is trained; see ``UnsplitModel.at_rest``."""
    return model.at_rest(what) if isinstance(model, UnsplitModel) else contextlib.nullcontext(model)


class _WholeWriter(FileSystemWriter):
    """Writes a folder beside ``path``, and renames it to ``path`` once it is complete."""

    def __init__(self, path: Path, extra: bytes) -> None:
        self._folder = path.with_name(f".{path.name}.saving")
        super().__init__(self._folder)
        self._target = path
        self._extra = extra

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            shutil.rmtree(self._folder, ignore_errors=True)  # left by a crash
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        with whole_file(self._folder / _EXTRA) as file:
            file.write(self._extra)
        put_folder(self._folder, self._target)


class _StrictPlanner(DefaultLoadPlanner):
    """Refuses a checkpoint with entries that no process reads.

    Entries of an optimizer may be left over, and those of a loss function if none is trained here.
    """

    def create_local_plan(self) -> LoadPlan:
        try:
            return super().create_local_plan()
        except (RuntimeError, ValueError) as error:  # an entry is missing or has another size
            raise InvalidArgument(str(error)) from error

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        wanted = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        ignored: tuple[str, ...] = optimizer_state.PREFIXES
        if not any(name.startswith(LOSS) for name in wanted):
            ignored = (*ignored, LOSS)
        assert self.metadata is not None
        for key in self.metadata.state_dict_metadata:
            if key not in wanted and not key.startswith(ignored):
                raise InvalidArgument(f"it holds {key!r}, which the model does not have")
        return super().create_global_plan(global_plan)


def _check_target(path: Path) -> None:
    """Raises InvalidArgument if a checkpoint would replace a file or a folder that is not one."""
    if path.exists():
        others = [path] if not path.is_dir() else path.iterdir()
        for other in others:
            if other.suffix != ".distcp" and other.name not in (".metadata", _EXTRA):
                raise InvalidArgument(
                    f"{str(other)!r} is there, which belongs to no checkpoint; give a folder of its own"
                )


def _packed(extra: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    try:
        torch.save(extra, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception as error:
        raise InvalidArgument(
            f"of {', '.join(extra)}, one value is not made of tensors, numbers, text, lists and dicts; give "
            "its state_dict()"
        ) from error
    return file.getvalue()
