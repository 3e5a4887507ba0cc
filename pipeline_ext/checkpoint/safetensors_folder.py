"""Folders of safetensors files, as those of Hugging Face: one file, or several with an index."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidArgument, PipelineError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = (
    "model*.safetensors",
    INDEX,
    "pytorch_model*.bin",
    "pytorch_model.bin.index.json",
)  # of earlier saves too
_MAPPED = 16 << 20  # bytes of a file that are read before it is opened anew
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class Look(NamedTuple):
    """The type and shape of a tensor in a file."""

    dtype: torch.dtype | str  # text: one that torch does not have
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class SafetensorsFolder:
    """The tensors of a folder.

    Attributes:
        names: of all tensors.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InvalidArgument for a folder without safetensors files."""
        self._library = library()
        self._folder = folder
        if (folder / INDEX).is_file():
            self._file_of: dict[str, str] = _weight_map(folder / INDEX)
        elif (folder / SINGLE).is_file():
            with self._open(SINGLE) as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise InvalidArgument(_nothing_there(folder))
        self.names = list(self._file_of)

    def looks(self, names: Iterable[str]) -> dict[str, Look]:
        """The types and shapes of tensors."""
        found = {}
        for file_name, of_file in self._by_file(names).items():
            with self._open(file_name) as file:
                inside = set(file.keys())
                for name in of_file:
                    if name not in inside:
                        raise InvalidArgument(
                            f"the index says that {file_name} holds {name!r}, which it does not"
                        )
                    part = file.get_slice(name)
                    dtype = part.get_dtype()
                    found[name] = Look(_DTYPES.get(dtype, dtype), tuple(part.get_shape()))
        return found

    def read(self, name: str) -> Iterator[tuple[Any, Tensor]]:
        """The values of a tensor in parts, each with its index.

        What has been read stays mapped in memory until the file is closed, so each part opens it.
        """
        rows, each = self._parts(name)
        if rows is None:
            with self._open(self._file_of[name]) as file:
                yield ..., file.get_tensor(name)
            return
        for begin in range(0, rows, each):
            with self._open(self._file_of[name]) as file:
                part = slice(begin, min(begin + each, rows))
                yield part, file.get_slice(name)[part]

    def _parts(self, name: str) -> tuple[int | None, int]:
        """The number of rows of a tensor, if it has any, and how many to read at a time."""
        look = self.looks([name])[name]
        if not look.shape:
            return None, 1
        assert isinstance(look.dtype, torch.dtype)
        of_row = look.dtype.itemsize * math.prod(look.shape[1:])
        return look.shape[0], max(1, _MAPPED // max(1, of_row))

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self._file_of[name], []).append(name)
        return found

    def _open(self, file_name: str) -> Any:
        try:
            return self._library.safe_open(self._folder / file_name, framework="pt")
        except FileNotFoundError:
            raise InvalidArgument(f"the index names the file {file_name!r}, which is not there") from None
        except self._library.SafetensorError as error:
            raise InvalidArgument(f"{file_name!r} is damaged: {error}") from error


def library() -> ModuleType:
    """The package safetensors. Raises PipelineError if it is missing."""
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise PipelineError(
            "safetensors is needed to read and write such folders: pip install 'pipeline_ext[safetensors]'"
        ) from error
    return safetensors


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes one safetensors file. Raises PipelineError or OSError if that fails."""
    used = library()
    try:
        # transformers refuses files that do not say which framework wrote them.
        used.torch.save_file(dict(tensors), path, metadata={"format": "pt"})
    except used.SafetensorError as error:
        raise PipelineError(f"{path.name!r} cannot be written: {error}") from error


def file_names(count: int) -> list[str]:
    """The names of the files of a folder with so many."""
    if count == 1:
        return [SINGLE]
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text())["weight_map"]
        assert all(isinstance(name, str) and Path(file).name == file for name, file in found.items())
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise InvalidArgument(f"{path.name!r} is no index of safetensors files") from error
    return dict(found)


def _nothing_there(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder; huggingface_hub.snapshot_download makes one of the hub's models"
    if any(folder.glob("pytorch_model*.bin")):
        return (
            "it holds a pickle (pytorch_model.bin), which can run code when it is read; write safetensors "
            "first, with from_pretrained(folder).save_pretrained(other) of transformers"
        )
    return f"it holds neither {SINGLE} nor {INDEX}"
