"""Saves a model as a folder of safetensors files, gathered from the processes that hold it, file by file."""

import copy
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..base.files import folder_at
from ..base.imported import is_dtensor
from ..base.lock import holder
from ..errors import InvalidArgument
from ..processes.gather import of_all, receive, send
from .folder import replacing
from .safetensors_folder import INDEX, WEIGHTS, file_names, library, write_file
from .together import together
from .unsplit import UnsplitModel, at_rest, weights_of


def save_pretrained(
    model: UnsplitModel | nn.Module, folder: str | os.PathLike, *, max_shard_size: int = 1 << 30
) -> None:
    """Saves the weights as safetensors files, for ``from_pretrained`` of transformers and ``load_pretrained``.

    If the pipeline is in many processes, all processes of torch.distributed call it together; process 0 writes,
    and holds one file's tensors at a time beside its own. Tied parameters are written once, under their first
    name. With them go the index, and the configurations of a model of transformers. Other files of the folder,
    as a tokenizer's, stay. A crash at any moment leaves the old folder or the new one.

    Args:
        model: a Pipeline, or a plain module.
        folder: is made if it is not there.
        max_shard_size: the bytes of a file, at most; a tensor that is larger has a file of its own.

    Raises:
        InvalidArgument: ``max_shard_size`` is no positive number, or ``folder`` is a file.
        PipelineError: safetensors is not installed, another process saves there, the folder cannot be written,
            or a step is running. What was there is unchanged.
    """
    path = Path(os.path.realpath(folder))
    weights = weights_of(model)
    with at_rest(model, "save_pretrained was called"):
        what = f"{str(path)!r} cannot be written"
        rank = 0 if weights.alone else dist.get_rank()
        with together(what, weights.alone):
            _check(path, max_shard_size)
            library()
            here = weights.module.state_dict()
            looks = _looks(here, weights.repeated)
        shards = _shards(of_all(looks, alone=weights.alone), max_shard_size)
        with holder() as held, replacing(path, what, held, weights.alone) as new:
            with together(what, weights.alone):
                if rank == 0:
                    _take_over(path, new)
            names = file_names(len(shards))
            for file_name, shard in zip(names, shards):
                with together(what, weights.alone):
                    gathered = ((entry.name, _gathered(entry, here, rank)) for entry in shard)
                    tensors = {name: tensor for name, tensor in gathered if tensor is not None}
                    if rank == 0:
                        write_file(new / file_name, tensors)
                    del tensors
            with together(what, weights.alone):
                if rank == 0:
                    if len(shards) > 1:
                        _write_index(new / INDEX, dict(zip(names, shards)))
                    _write_configurations(weights.module, here, new)


_Look = tuple[str, torch.dtype, tuple[int, ...]]


class _Entry(NamedTuple):
    """A tensor of the whole model."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    holders: list[int]  # the processes that have it

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def _check(path: Path, max_shard_size: int) -> None:
    if type(max_shard_size) is not int or max_shard_size < 1:
        raise InvalidArgument(f"max_shard_size is {max_shard_size!r}; give a number of bytes, as 1 << 30")
    if path.exists() and not path.is_dir():
        raise InvalidArgument("it is a file; give a folder")


def _take_over(path: Path, new: Path) -> None:
    """Lets the folder that will replace the one at ``path`` have what that holds beside weights."""
    before = folder_at(path)
    if before is None:
        return

    def weights(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if Path(folder) == before and any(fnmatch(n, pattern) for pattern in WEIGHTS)]

    shutil.copytree(before, new, symlinks=True, ignore=weights, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    """Lets a file have a second name; copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _looks(here: Mapping[str, Any], repeated: Mapping[str, str]) -> list[_Look]:
    """The tensors of this process, by the first name of each."""
    for name, value in here.items():
        if not isinstance(value, Tensor):
            raise InvalidArgument(
                f"{name!r} is a {type(value).__name__}, and safetensors files hold tensors only; use "
                "save_checkpoint"
            )
    return [(name, t.dtype, tuple(t.shape)) for name, t in here.items() if repeated.get(name, name) == name]


def _shards(looks: Sequence[list[_Look]], largest: int) -> list[list[_Entry]]:
    """The tensors of each file. ``looks``: by process."""
    entries: dict[str, _Entry] = {}
    for rank, of_process in enumerate(looks):
        for name, dtype, shape in of_process:
            entries.setdefault(name, _Entry(name, dtype, shape, [])).holders.append(rank)
    shards: list[list[_Entry]] = [[]]
    for entry in entries.values():
        if shards[-1] and sum(other.size for other in shards[-1]) + entry.size > largest:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _gathered(entry: _Entry, here: Mapping[str, Tensor], rank: int) -> Tensor | None:
    """A tensor in process 0, from the first that has it; None in the others. ``rank``: of this process."""
    own = here.get(entry.name) if rank in entry.holders else None
    if is_dtensor(own):
        own = own.full_tensor()  # all that hold it do this together
    first = entry.holders[0]
    if first == 0:
        return own.contiguous() if own is not None and rank == 0 else None
    if rank == first:
        assert own is not None
        send(own, 0)
    return receive(entry.shape, entry.dtype, first) if rank == 0 else None


def _write_index(path: Path, shards: Mapping[str, Sequence[_Entry]]) -> None:
    weight_map = {entry.name: file_name for file_name, shard in shards.items() for entry in shard}
    total = sum(entry.size for shard in shards.values() for entry in shard)
    path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")


def _write_configurations(module: nn.Module, here: Mapping[str, Tensor], folder: Path) -> None:
    """Those of a model of transformers, if it is one."""
    config: Any = getattr(module, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        return
    config = copy.deepcopy(config)
    config.architectures = [type(module).__name__]
    floating = [tensor.dtype for tensor in here.values() if tensor.is_floating_point()]
    config.dtype = floating[0] if floating else None
    config.save_pretrained(folder)
    of_generation: Any = getattr(module, "generation_config", None)
    if callable(getattr(of_generation, "save_pretrained", None)):
        of_generation.save_pretrained(folder)
