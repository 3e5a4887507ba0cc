"""Exchanges state with torch.distributed.checkpoint, in its own format, whose table of contents is a pickle."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ..base.files import folder_at
from ..base.imported import is_dtensor
from ..base.lock import holder
from ..errors import InvalidArgument
from . import optimizer_state
from .files import check_target
from .folder import replacing
from .pieces import room
from .state import put_state, state_of
from .together import together
from .unsplit import LOSS, UnsplitModel

_EXTRA = "extra.pt"  # beside the format's own files, in folders of earlier versions of this package


def export_dcp(
    path: str | os.PathLike, model: UnsplitModel | nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Saves the state of model and optimizer as ``torch.distributed.checkpoint.save`` does, for torch to load.

    Otherwise as ``save_checkpoint``, without ``extra``. The optimizer's state has the names of
    ``get_optimizer_state_dict`` with ``flatten_optimizer_state_dict=True``, below "optimizer".

    Raises:
        InvalidArgument: the optimizer has other parameters or nested state, or ``path`` is not a checkpoint.
        PipelineError: another process saves there, the folder cannot be written, or a step is running.
    """
    path = Path(os.path.realpath(path))
    what = f"{str(path)!r} cannot be written"
    with together(what):
        state = state_of(model, optimizer, "export_dcp was called")
    with holder() as held, replacing(path, what, held, check=check_target) as folder:
        with together(what), _as_raised():
            save(state, storage_writer=FileSystemWriter(folder))


def import_dcp(
    path: str | os.PathLike, model: UnsplitModel | nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Copies in what ``export_dcp``, ``torch.distributed.checkpoint.save`` or an earlier version has saved.

    Give it only folders that you trust: their table of contents is a pickle, which can run any code when it is
    read, and nothing has a checksum. ``save_checkpoint`` then makes a checkpoint of it that is safe to load.
    Otherwise as ``load_checkpoint``.

    Returns:
        The extra values of an earlier version's ``save_checkpoint``; else nothing.

    Raises:
        InvalidArgument: there is no folder; names or shapes in it differ from the model's; or the groups of the
            optimizer differ. Nothing has changed.
        PipelineError: the folder cannot be read, or a step is running.
    """
    path = Path(os.path.realpath(path))
    what = f"{str(path)!r} cannot be loaded"
    with together(what):
        folder = folder_at(path)
        if folder is None or not (folder / ".metadata").is_file():
            raise InvalidArgument("it is no folder of torch.distributed.checkpoint: it has no .metadata")
        reader = FileSystemReader(folder)
        extra_file = folder / _EXTRA
        extra = torch.load(extra_file, weights_only=True) if extra_file.exists() else {}
        held = reader.read_metadata().state_dict_metadata
        state = state_of(model, None, "import_dcp was called")
        loaded = {name: _beside(value) for name, value in state.items()}
        names = {} if optimizer is None else optimizer_state.names(model, optimizer)
        of_optimizer = optimizer_state.entries(held, names)
        kept = {name: _room(held[name], parameter) for name, parameter in of_optimizer.items()}
    with together(what), _as_raised():
        load(kept, storage_reader=reader)
    with together(what):
        optimizer_dict = {} if optimizer is None else optimizer_state.positional(optimizer, names, kept)
    with together(what), _as_raised():
        load(loaded, storage_reader=reader, planner=_StrictPlanner())
    put_state(model, optimizer, loaded, optimizer_dict, "import_dcp was called")
    return extra


@contextlib.contextmanager
def _as_raised() -> Iterator[None]:
    """Raises what the first of the processes raised, as it was."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as report:
            error, _ = next(iter(report.failures.values()))
            raise error from None


def _beside(value: Any) -> Any:
    """A tensor to read into in place of one of the model; any other value itself."""
    if not isinstance(value, Tensor):
        return value
    return room(value.dtype, value.shape, value if is_dtensor(value) else None)


def _room(entry: Any, parameter: nn.Parameter) -> Tensor | None:
    """A tensor to read an entry into, sharded like the parameter; None if the entry is not a tensor."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    return room(entry.properties.dtype, entry.size, parameter)


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
