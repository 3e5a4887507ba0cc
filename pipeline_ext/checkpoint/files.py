"""Saves and loads checkpoints: folders of safetensors files and a manifest, under the unsplit model's names.

Because of the names, each process finds what it needs however the model was cut when it was saved.
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.files import folder_at
from ..base.lock import holder
from ..errors import InvalidArgument
from ..processes.gather import of_all, rank_and_size
from . import manifest, optimizer_state
from .folder import replacing
from .manifest import Manifest
from .reading import Reading, check_files, check_names
from .state import put_state, state_of
from .together import together
from .unsplit import LOSS, UnsplitModel
from .writing import Contents, write


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
        extra: values made of tensors, numbers, text, bytes, lists, tuples, sets and dicts. Those of process 0
            are written.

    Raises:
        InvalidArgument: the optimizer has other parameters or nested state; a value cannot be kept, by name; or
            ``path`` is not a checkpoint. Nothing has been written.
        PipelineError: another process saves there, the checkpoint cannot be written, or a step is running. The
            old checkpoint is unchanged, and what was written of the new one is removed.
    """
    path = Path(os.path.realpath(path))
    what = f"the checkpoint {str(path)!r} cannot be written"
    with together(what):
        contents = Contents(state_of(model, optimizer, "save_checkpoint was called"), extra)
    with holder() as held, replacing(path, what, held, check=check_target) as folder:
        write(folder, contents, what)


def load_checkpoint(
    path: str | os.PathLike,
    model: UnsplitModel | nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Any]:
    """Copies in what ``save_checkpoint`` has written; the model may be cut in another way, or not at all.

    All processes of torch.distributed call it together. Before anything of the model changes, every file is
    compared with its checksum, and all is read into memory beside the model. Nothing is unpickled.

    Args:
        path: the folder to read.
        model: a Pipeline, or a plain module.
        optimizer: an optimizer of ``model.parameters()`` or some of them.

    Returns:
        The ``extra`` that was saved; its tensors are on the CPU.

    Raises:
        InvalidArgument: there is no checkpoint; it is damaged, with the name of the file; it is a folder of
            torch.distributed.checkpoint; names or shapes in it differ from the model's; or the groups of the
            optimizer differ. Nothing has changed.
        PipelineError: the checkpoint cannot be read, or a step is running.
    """
    path = Path(os.path.realpath(path))
    what = f"the checkpoint {str(path)!r} cannot be loaded"
    with together(what):
        folder = folder_at(path)
        if folder is None:
            raise InvalidArgument("there is none")
        found = manifest.read(folder)
    with together(what):
        _check_one(found)
        check_files(folder, found, *rank_and_size())
    with together(what):
        state = state_of(model, None, "load_checkpoint was called")
        names = {} if optimizer is None else optimizer_state.names(model, optimizer)
        of_optimizer = optimizer_state.entries([*found.tensors, *found.values], names)
    wanted = {name for of_process in of_all([*state, *of_optimizer]) for name in of_process}
    with together(what):
        of_loss = () if any(name.startswith(LOSS) for name in wanted) else (LOSS,)
        check_names(found, state, wanted, may_be_left=(*optimizer_state.PREFIXES, *of_loss))
        reading = Reading(folder, found)
        state |= {name: reading.entry(name, like) for name, like in state.items()}
        kept = {name: reading.entry(name, parameter) for name, parameter in of_optimizer.items()}
        extra = {name: reading.value(name, encoded) for name, encoded in found.extra.items()}
        reading.finish()
        optimizer_dict = {} if optimizer is None else optimizer_state.positional(optimizer, names, kept)
    put_state(model, optimizer, state, optimizer_dict, "load_checkpoint was called")
    return extra


def _check_one(found: Manifest) -> None:
    """Raises InvalidArgument if the processes have read different checkpoints."""
    looks = of_all((found.saved, sorted(found.files)))
    if any(look != looks[0] for look in looks):
        raise InvalidArgument(
            "the processes see different checkpoints there; give a path on a file system that all share, and "
            "load it while no run saves there"
        )


def check_target(path: Path) -> None:
    """Raises InvalidArgument if a checkpoint would replace a file, or a folder that is not one."""
    if path.exists():
        for other in [path] if not path.is_dir() else path.iterdir():
            if other.name not in (manifest.NAME, *_OF_DCP) and other.suffix not in (".safetensors", ".distcp"):
                raise InvalidArgument(
                    f"{str(other)!r} is there, which belongs to no checkpoint; give a folder of its own"
                )


_OF_DCP = (".metadata", "extra.pt")  # in folders of torch.distributed.checkpoint, and of earlier versions
