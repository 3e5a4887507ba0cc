"""The table of contents of a checkpoint folder, as JSON: what each file holds, and what it must look like.

The first line says the format and the checksum of the second, which has the rest::

    {"format": "pipeline_ext checkpoint folder", "version": 1, "sha256": ...}
    {"saved": seconds since 1970,
     "files": {file: {"size": bytes, "sha256": checksum}},
     "tensors": {name: {"dtype": ..., "shape": [...], "pieces": [
         {"file": ..., "at": its first byte there, "offsets": [...], "shape": [...]}]}},
     "values": {name: value}, "extra": {name: value}}

Values are those of ``exact_json``; their tensors are among the tensors, under names of their own.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from ..base.dtypes import DTYPES, NAMES
from ..errors import InvalidArgument
from .pieces import Box

NAME = "manifest.jsonl"
_FORMAT = "pipeline_ext checkpoint folder"
_VERSION = 1
_MOST = 2**63 - 1  # elements and bytes that torch can count
_DIMENSIONS = 64
_FILE_NAME = re.compile(r"[0-9a-z-]{1,100}\.safetensors", re.ASCII)


class StoredFile(NamedTuple):
    size: int  # in bytes
    sha256: str


class StoredPiece(NamedTuple):
    """Where a box of a tensor is."""

    file: str
    at: int  # the first byte in that file; the others follow, in the order of rows
    box: Box


class StoredTensor(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[StoredPiece]

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]}{list(self.shape)}"


class Manifest(NamedTuple):
    saved: float  # seconds since 1970
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, StoredTensor]
    values: Mapping[str, Any]  # as ``exact_json`` has encoded them
    extra: Mapping[str, Any]

    def within_values(self) -> set[str]:
        """The names of the tensors that stand inside of values."""
        return set(_named([*self.values.values(), *self.extra.values()]))


def is_file_name(name: str) -> bool:
    """Whether a file of tensors may be called so."""
    return _FILE_NAME.fullmatch(name) is not None


def as_bytes(manifest: Manifest) -> bytes:
    """The content of a manifest's file."""
    tensors = {
        name: {
            "dtype": NAMES[tensor.dtype],
            "shape": tensor.shape,
            "pieces": [
                {"file": piece.file, "at": piece.at, "offsets": piece.box.offsets, "shape": piece.box.shape}
                for piece in tensor.pieces
            ],
        }
        for name, tensor in manifest.tensors.items()
    }
    content = {
        "saved": manifest.saved,
        "files": {name: file._asdict() for name, file in manifest.files.items()},
        "tensors": tensors,
        "values": manifest.values,
        "extra": manifest.extra,
    }
    body = json.dumps(content, allow_nan=False).encode()
    head = {"format": _FORMAT, "version": _VERSION, "sha256": hashlib.sha256(body).hexdigest()}
    return b"%s\n%s\n" % (json.dumps(head).encode(), body)


def read(folder: Path) -> Manifest:
    """The manifest of a folder. Raises InvalidArgument if there is none, or it is damaged, foreign or newer."""
    file = folder / NAME
    if not file.is_file():
        if (folder / ".metadata").exists():
            raise InvalidArgument(
                "it is a folder of torch.distributed.checkpoint, whose .metadata is a pickle and can run code "
                "when it is read; if you trust it, read it with pipeline_ext.import_dcp(path, model, optimizer)"
            )
        raise InvalidArgument(f"it holds no {NAME}, which a checkpoint of save_checkpoint has")
    return parsed(file.read_bytes())


def parsed(content: bytes) -> Manifest:
    """The manifest that ``as_bytes`` made ``content`` of. Raises InvalidArgument if it did not."""
    head, _, body = content.partition(b"\n")
    begin = _json(head)
    if not isinstance(begin, dict) or begin.get("format") != _FORMAT:
        raise InvalidArgument(f"its {NAME} is damaged, or is not of save_checkpoint; give another checkpoint")
    version = begin.get("version")
    if type(version) is int and version > _VERSION:
        raise InvalidArgument(
            f"it has format {version} and this pipeline_ext reads formats up to {_VERSION}; install the newer "
            "one that wrote it"
        )
    if (
        type(version) is not int
        or version != _VERSION
        or begin.get("sha256") != hashlib.sha256(body.removesuffix(b"\n")).hexdigest()
    ):
        _damaged("its checksum differs")
    try:
        return _checked(_json(body))
    except (TypeError, LookupError, AttributeError, RecursionError, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(_text(f"{type(error).__name__}: {error}")) from error


def _json(text: bytes) -> Any:
    def refuse(constant: str) -> NoReturn:
        _damaged(f"{constant} is no number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(_text("it is no JSON, or is nested too deeply")) from error


def _damaged(why: str) -> NoReturn:
    raise InvalidArgument(_text(why))


def _text(why: str) -> str:
    return f"its {NAME} is damaged: {why}; give another checkpoint"


def _checked(content: dict[str, Any]) -> Manifest:
    saved = content["saved"]
    if type(saved) not in (int, float):
        _damaged("its time is no number")
    files = {name: _file(name, **file) for name, file in content["files"].items()}
    tensors = {name: _tensor(name, files, **tensor) for name, tensor in content["tensors"].items()}
    manifest = Manifest(float(saved), files, tensors, dict(content["values"]), dict(content["extra"]))
    for name in manifest.within_values():
        if name not in tensors:
            _damaged(f"a value holds the tensor {name!r}, which is nowhere")
    return manifest


def _file(name: str, size: int, sha256: str) -> StoredFile:
    if not is_file_name(name):
        _damaged(f"{name!r} is no name of a file beside it")
    if type(sha256) is not str:
        _damaged(f"the checksum of {name!r} is no text")
    return StoredFile(_count(size), sha256)


def _tensor(
    name: str, files: Mapping[str, StoredFile], dtype: str, shape: list[int], pieces: list[dict[str, Any]]
) -> StoredTensor:
    stored = StoredTensor(DTYPES[dtype], _counts(shape), [])
    for piece in pieces:
        file, at, box = (
            piece["file"],
            _count(piece["at"]),
            Box(_counts(piece["offsets"]), _counts(piece["shape"])),
        )
        if not box.is_inside(stored.shape):
            _damaged(f"a piece of {name!r} is not inside of it")
        if at + box.size * stored.dtype.itemsize > files[file].size:
            _damaged(f"a piece of {name!r} is beyond the end of {file!r}")
        stored.pieces.append(StoredPiece(file, at, box))
    if sum(piece.box.size for piece in stored.pieces) != math.prod(stored.shape):
        _damaged(f"the pieces of {name!r} do not make the whole")
    return stored


def _counts(values: list[int]) -> tuple[int, ...]:
    if type(values) is not list or len(values) > _DIMENSIONS:
        _damaged(f"a shape is not a list of at most {_DIMENSIONS} numbers")
    counts = tuple(map(_count, values))
    if math.prod(counts) > _MOST:
        _damaged("a tensor is larger than any can be")
    return counts


def _count(value: int) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        _damaged(f"{str(value)[:40]} is neither a size nor a place")
    return value


def _named(encoded: Any) -> Iterator[str]:
    """The names of the tensors within encoded values."""
    if isinstance(encoded, list):
        for item in encoded:
            yield from _named(item)
    elif isinstance(encoded, dict):
        for kind, content in encoded.items():
            yield from [content] if kind == "tensor" and type(content) is str else _named(content)
