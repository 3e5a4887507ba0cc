"""Writes the files of a checkpoint: each process its share of the tensors, the first one the manifest."""

import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base import exact_json
from ..base.dtypes import DTYPES
from ..base.files import whole_file
from ..errors import InvalidArgument
from ..processes.gather import of_all, rank_and_size
from . import manifest, tensor_files
from .manifest import Manifest, StoredFile, StoredPiece, StoredTensor
from .pieces import Box, Held, here, writers
from .together import together


class Contents:
    """What this process has for a checkpoint."""

    def __init__(self, state: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Raises InvalidArgument, by name, for what cannot be kept."""
        self.tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self.values = {
            name: self._encoded(name, value, name) for name, value in state.items() if name not in self.tensors
        }
        self.extra = {name: self._encoded(name, value, f"extra.{name}") for name, value in extra.items()}
        self.held = {name: Held.of(name, tensor) for name, tensor in self.tensors.items()}

    def _encoded(self, name: str, value: Any, stem: str) -> Any:
        inside = 0

        def put(tensor: Tensor) -> str:
            nonlocal inside
            key = f"{stem}#{inside}"
            inside += 1
            if self.tensors.setdefault(key, tensor) is not tensor:
                raise InvalidArgument(
                    f"a tensor within {name!r} is saved as {key!r}, which is there; rename that"
                )
            return key

        return exact_json.encode(value, name, put)


def write(folder: Path, contents: Contents, what: str) -> None:
    """Writes all files; all processes call it together. Raises as ``together(what)`` does."""
    rank, _ = rank_and_size()
    described = of_all({name: tuple(held) for name, held in contents.held.items()})
    held = [{name: Held(*look) for name, look in of_process.items()} for of_process in described]
    with together(what):
        writer_of = writers(held)
        share = _share(contents.tensors, writer_of, rank)
        files, written = _write_share(folder, f"{secrets.token_hex(8)}-{rank}", share, writer_of)
    reports = of_all((files, written, contents.values))
    with together(what):
        if rank == 0:
            looks = {name: look for of_process in reversed(held) for name, look in of_process.items()}
            content = _manifest(looks, writer_of, reports, contents.extra)
            with whole_file(folder / manifest.NAME) as file:
                file.write(manifest.as_bytes(content))


def _share(
    tensors: Mapping[str, Tensor], writer_of: Mapping[str, Mapping[Box, int]], rank: int
) -> list[tuple[str, Box, Tensor]]:
    """What this process writes."""
    held = [(name, *here(tensor)) for name, tensor in tensors.items()]
    return [each for each in held if writer_of[each[0]].get(each[1]) == rank]


_Written = list[tuple[str, tuple[int, ...], tuple[int, ...], str, int]]  # name, box, file and first byte


def _write_share(
    folder: Path, stem: str, share: list[tuple[str, Box, Tensor]], writer_of: Mapping[str, Mapping[Box, int]]
) -> tuple[dict[str, tuple[int, str]], _Written]:
    """Writes it, what shares its memory once. Returns the files with size and checksum, and where all is."""
    key_of_memory: dict[Any, str] = {}
    distinct: dict[str, Tensor] = {}
    keys = []
    for name, box, local in share:
        memory = (local.data_ptr(), local.device, local.dtype, local.shape, local.stride())
        key = key_of_memory.setdefault(
            memory, name if len(writer_of[name]) == 1 else f"{name} {list(box.offsets)}"
        )
        distinct[key] = local
        keys.append((name, box, key))
    files, place_of = tensor_files.write(folder, stem, distinct)
    return (
        {name: (file.size, file.sha256) for name, file in files.items()},
        [(name, *box, *place_of[key]) for name, box, key in keys],
    )


def _manifest(
    looks: Mapping[str, Held],
    writer_of: Mapping[str, Any],
    reports: list[tuple[Mapping[str, tuple[int, str]], _Written, Mapping[str, Any]]],
    extra: Mapping[str, Any],
) -> Manifest:
    """``reports``: of each process its files, what it has written, and its values."""
    tensors = {name: StoredTensor(DTYPES[looks[name].dtype], looks[name].shape, []) for name in writer_of}
    files: dict[str, StoredFile] = {}
    values: dict[str, Any] = {}
    for of_process, written, its_values in reports:
        files |= {name: StoredFile(*file) for name, file in of_process.items()}
        values = {**its_values, **values}
        for name, offsets, shape, file, at in written:
            tensors[name].pieces.append(StoredPiece(file, at, Box(offsets, shape)))
    return Manifest(time.time(), files, tensors, values, extra)
