"""Files of tensors, with checksums.

They are safetensors files, which other programs read. Here the manifest says where a tensor is in a file, and
its bytes are copied: no memory is mapped, no header is trusted, and the library is not needed.
"""

import ctypes
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import InvalidArgument, PipelineError
from .manifest import StoredFile, StoredPiece, StoredTensor
from .pieces import Box

_LARGEST = 1 << 30  # bytes of a file, unless one tensor is larger
_BLOCK = 1 << 22  # bytes read at a time
# All that every version of the format has; a tensor of another type looks like its bytes.
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Places = dict[str, tuple[str, int]]  # the file of each tensor, and its first byte there


def write(folder: Path, stem: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, StoredFile], Places]:
    """Writes new files, which survive a power cut; ``stem`` begins their names.

    Tensors may be on any device: one at a time is copied. Raises PipelineError if the disk is full, or another
    OSError.
    """
    files: dict[str, StoredFile] = {}
    places: Places = {}
    for number, keys in enumerate(_shared_out(tensors)):
        name = f"{stem}-{number}.safetensors"
        try:
            files[name], at = _write_one(folder / name, {key: tensors[key] for key in keys})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PipelineError(
                f"no space left on the disk of {str(folder.parent)!r}; free some, or save elsewhere; what was "
                "written is removed, and the old one is unchanged"
            ) from error
        places |= {key: (name, first) for key, first in at.items()}
    return files, places


def _shared_out(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The keys of each file; larger types come first, as the format wants it for alignment."""
    keys: list[str] = []
    size = 0
    for key, tensor in sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize):
        if keys and size + tensor.nbytes > _LARGEST:
            yield keys
            keys, size = [], 0
        keys.append(key)
        size += tensor.nbytes
    if keys:
        yield keys


def _write_one(path: Path, tensors: Mapping[str, Tensor]) -> tuple[StoredFile, dict[str, int]]:
    """Returns the file, and the first byte of each tensor in it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at: dict[str, int] = {}
    end = 0
    for key, tensor in tensors.items():
        plain = tensor.dtype in _TYPES
        at[key], end = end, end + tensor.nbytes
        header[key] = {
            "dtype": _TYPES[tensor.dtype] if plain else "U8",
            "shape": list(tensor.shape) + ([] if plain else [tensor.dtype.itemsize]),
            "data_offsets": [at[key], end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    checksum = hashlib.sha256()
    with path.open("xb", buffering=0) as file:
        for part in (memoryview(head), *map(_bytes, tensors.values())):
            checksum.update(part)
            while part:
                part = part[file.write(part) :]
        os.fsync(file.fileno())
        stored = StoredFile(file.tell(), checksum.hexdigest())
    return stored, {key: len(head) + first for key, first in at.items()}


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; of the tensor's own memory, if that is on the CPU and contiguous."""
    held = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    array = (ctypes.c_char * held.nbytes).from_address(held.data_ptr())
    array._held = held  # type: ignore[attr-defined]  # the memory lives as long as the view
    return memoryview(array).cast("B")


def check(folder: Path, name: str, expected: StoredFile) -> None:
    """Raises InvalidArgument, which names the file, if its bytes are not those that were written."""
    path = folder / name
    if not path.is_file():
        raise InvalidArgument(f"its file {name!r} is missing{_SO}")
    size = path.stat().st_size
    if size != expected.size:
        raise InvalidArgument(f"its file {name!r} has {size} bytes where {expected.size} were saved{_SO}")
    checksum = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            checksum.update(block)
    if checksum.hexdigest() != expected.sha256:
        raise InvalidArgument(f"its file {name!r} is damaged: its checksum is not that of what was saved{_SO}")


_SO = "; give another checkpoint"


class Reader:
    """Reads boxes of tensors from the files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._wanted: dict[str, list[tuple[StoredPiece, torch.dtype, Box, Tensor]]] = {}

    def want(self, stored: StoredTensor, box: Box, into: Tensor) -> None:
        """``read`` will copy a box of a tensor into ``into``, and convert its values to the type of that."""
        for piece in stored.pieces:
            common = piece.box.common(box)
            if common is not None:
                part = into[common.slices(box)]
                self._wanted.setdefault(piece.file, []).append((piece, stored.dtype, common, part))

    def read(self) -> None:
        """Raises InvalidArgument if a file is gone or shorter than it was."""
        for name, wanted in self._wanted.items():
            try:
                with (self._folder / name).open("rb") as file:
                    for piece, dtype, common, part in wanted:
                        part.copy_(_read_one(file, piece, dtype, common))
            except (FileNotFoundError, EOFError) as error:
                raise InvalidArgument(
                    f"its file {name!r} was replaced while it was read; load it again"
                ) from error


def _read_one(file: BinaryIO, piece: StoredPiece, dtype: torch.dtype, box: Box) -> Tensor:
    """The values of a box of a piece. Reads the rows that it is in."""
    rows, *others = box.slices(piece.box) or (slice(0, 1),)
    of_row = piece.box.shape[1:]
    values = torch.empty((rows.stop - rows.start, *of_row), dtype=dtype)
    file.seek(piece.at + rows.start * math.prod(of_row) * dtype.itemsize)
    left = _bytes(values)
    while left:
        count = file.readinto(left)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        left = left[count:]
    return values[(slice(None), *others)] if piece.box.shape else values[0]
