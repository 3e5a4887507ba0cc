"""Checkpoints in the format of torch.distributed.checkpoint, under the names of the unsplit model.

So every process can read what it needs, however the model was cut when it was saved.
"""

import contextlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata

from ..base.files import folder_at, put_folder, whole_file
from ..errors import InvalidArgument, PipelineError
from . import optimizer_state
from .unsplit import LOSS, UnsplitModel

_EXTRA = "extra.pt"


def save_checkpoint(
    path: str | os.PathLike,
    model: UnsplitModel | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    **extra: Any,
) -> None:
    """Writes a folder with the model's state, the optimizer's, and ``extra``, in place of the one at ``path``.

    All processes of torch.distributed call it together, each with its own stages and an optimizer of their
    parameters, and all see the folder; what several of them hold is written once. A crash at any moment leaves
    the old checkpoint or the new one. Example::

        pe.save_checkpoint("run/last", pipe, optimizer, step=step, rates=scheduler.state_dict())

    Args:
        optimizer: over ``model.parameters()``, or some of them.
        extra: anything made of tensors, numbers, text, lists and dicts; that of process 0 is written.

    Raises:
        InvalidArgument: for an optimizer of other parameters, or with nested state; for any other ``extra``;
            where ``path`` is something else than a checkpoint. Nothing has been written.
        PipelineError: it cannot be written, or a step is running; what was there is unchanged.
    """
    path = Path(os.path.realpath(path))
    what = f"the checkpoint {str(path)!r} cannot be written"
    with _together(what):
        _check_place(path)
        packed = _packed(extra)
        with _at_rest(model, "save_checkpoint was called") as module:
            state = dict(module.state_dict())
        if optimizer is not None:
            state |= optimizer_state.by_name(optimizer, optimizer_state.names(model, optimizer))
    with _together(what):
        dcp.save(state, storage_writer=_WholeWriter(path, packed))


def load_checkpoint(
    path: str | os.PathLike,
    model: UnsplitModel | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Copies in what ``save_checkpoint`` has written, of a model cut in any way or not at all.

    All processes of torch.distributed call it together. Load only what you trust: torch.distributed.checkpoint
    keeps what is no tensor as a pickle, which can run code.

    Returns:
        The ``extra`` that was saved.

    Raises:
        InvalidArgument: there is no such checkpoint, it lacks something or has more than the model, shapes
            differ, or the optimizer's groups do; nothing has changed.
        PipelineError: it cannot be read, or a step is running.
    """
    path = Path(os.path.realpath(path))
    what = f"the checkpoint {str(path)!r} cannot be loaded"
    with _together(what):
        folder = folder_at(path)
        if folder is None:
            raise InvalidArgument("there is none")
        reader = dcp.FileSystemReader(folder)
        extra_file = folder / _EXTRA  # none in what torch.distributed.checkpoint alone has written
        extra = torch.load(extra_file, weights_only=True) if extra_file.exists() else {}
        with _at_rest(model, "load_checkpoint was called") as module:
            state = module.state_dict()
        names = {} if optimizer is None else optimizer_state.names(model, optimizer)
        kept = optimizer_state.room_for(reader.read_metadata().state_dict_metadata, names)
    with _together(what):
        dcp.load(kept, storage_reader=reader)
    with _together(what):
        packed = None if optimizer is None else optimizer_state.positional(optimizer, names, kept)
    loaded = dict(state)
    with _together(what):
        dcp.load(loaded, storage_reader=reader, planner=_StrictPlanner())
    state.update(loaded)
    with _at_rest(model, "load_checkpoint was called") as module:
        module.load_state_dict(state)
    if optimizer is not None:
        optimizer.load_state_dict(packed)
    return extra


def _at_rest(model: UnsplitModel | nn.Module, what: str) -> contextlib.AbstractContextManager[nn.Module]:
    """What of a model is saved, a trained loss function included; see ``UnsplitModel.at_rest``."""
    return model.at_rest(what) if isinstance(model, UnsplitModel) else contextlib.nullcontext(model)


class _WholeWriter(dcp.FileSystemWriter):
    """Writes beside ``path``, and puts it there once it is whole."""

    def __init__(self, path: Path, extra: bytes) -> None:
        super().__init__(path.with_name(f".{path.name}.saving"))
        self._place = path
        self._extra = extra

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            shutil.rmtree(self.path, ignore_errors=True)  # left by a crash
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        with whole_file(self.path / _EXTRA) as file:
            file.write(self._extra)
        put_folder(self.path, self._place)


class _StrictPlanner(dcp.DefaultLoadPlanner):
    """Refuses a checkpoint of which no process wants some part.

    An optimizer's may be left, and that of a loss function where there is none that is trained.
    """

    def create_local_plan(self) -> dcp.LoadPlan:
        try:
            return super().create_local_plan()
        except (RuntimeError, ValueError) as error:  # what is missing, or of another size
            raise InvalidArgument(str(error)) from error

    def create_global_plan(self, global_plan: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        wanted = {item.dest_index.fqn for plan in global_plan for item in plan.items}
        others = optimizer_state.BEGINNINGS
        if not any(name.startswith(LOSS) for name in wanted):
            others = (*others, LOSS)
        for key in self.metadata.state_dict_metadata:
            if key not in wanted and not key.startswith(others):
                raise InvalidArgument(f"it holds {key!r}, which the model has not")
        return super().create_global_plan(global_plan)


def _check_place(path: Path) -> None:
    """Raises InvalidArgument where a checkpoint would take the place of something else."""
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
            f"of {', '.join(extra)}, to be saved too, something is not made of tensors, numbers, text, lists "
            "and dicts; give its state_dict()"
        ) from error
    return file.getvalue()


@contextlib.contextmanager
def _together(what: str) -> Iterator[None]:
    """Raises in all processes what went wrong within in any of them: none waits for one that has given up."""
    error = None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except dcp.api.CheckpointException as report:
        error, _ = next(iter(report.failures.values()))
        if not isinstance(error, Exception):
            raise error from None  # as of Ctrl-C
    except Exception as raised:
        error = raised
    for failure in _of_all(error and (isinstance(error, InvalidArgument), str(error))):
        if failure is not None:
            refused, text = failure
            raise (InvalidArgument if refused else PipelineError)(f"{what}: {text}") from error


def _of_all(value: Any) -> list[Any]:
    """Every process's value."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
