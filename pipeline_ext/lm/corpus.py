"""Training data: the bytes of the user's files, or of the running Python's standard library."""

import hashlib
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InvalidArgument

_HELD_OUT = 20  # one part in 20 is for validation
_MAX_BYTES = 64 << 20


class Corpus:
    """Training and validation bytes.

    Args:
        path: a file or a folder; None: the source files of Python's standard library.
        context: number of bytes in a row.

    Raises:
        InvalidArgument: if there is nothing to read, or too little to fill one row.
    """

    def __init__(self, path: str | None, context: int) -> None:
        self.context = context
        root = Path(path) if path is not None else Path(sysconfig.get_path("stdlib"))
        if not root.exists():
            raise InvalidArgument(f"there is no file or folder {str(root)!r} to train on")
        try:
            train, held_out = _read_folder(root, path is None) if root.is_dir() else _read_file(root)
        except OSError as error:
            raise InvalidArgument(f"cannot read the data: {error}") from error
        need = context + 1
        if len(held_out) < need or len(train) < need:
            raise InvalidArgument(
                f"{str(root)!r} holds {len(train)} bytes to train on and {len(held_out)} to validate "
                f"with; each must be at least {need} (context + 1)"
            )
        self.name = "Python's standard library" if path is None else str(root)
        self.fingerprint = hashlib.sha256(train).hexdigest()  # identifies the training bytes
        self.train = torch.frombuffer(train, dtype=torch.uint8)
        self.held_out = torch.frombuffer(held_out, dtype=torch.uint8)

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random training rows: bytes and the bytes that follow them, both int64 [rows, context]."""
        starts = torch.randint(len(self.train) - self.context, (rows,), generator=generator)
        return _rows(self.train, starts, self.context)

    def validation(self, rows: int, batches: int) -> list[tuple[Tensor, Tensor]]:
        """Validation batches, spread evenly over the held-out bytes; the same at every call."""
        last = len(self.held_out) - self.context - 1
        starts = torch.linspace(0, last, rows * batches, dtype=torch.float64).long()
        return [_rows(self.held_out, part, self.context) for part in starts.split(rows)]


def _rows(data: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = data[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _read_file(path: Path) -> tuple[bytearray, bytearray]:
    with path.open("rb") as file:
        data = bytearray(file.read(_MAX_BYTES))
    cut = len(data) - len(data) // _HELD_OUT
    return data[:cut], data[cut:]


def _read_folder(root: Path, is_stdlib: bool) -> tuple[bytearray, bytearray]:
    skipped = {"site-packages", "dist-packages", "test", "tests"}
    if is_stdlib:
        files = [f for f in root.rglob("*.py") if skipped.isdisjoint(f.relative_to(root).parts)]
    else:
        files = [f for f in root.rglob("*") if f.is_file()]
    train, held_out = bytearray(), bytearray()
    for index, file in enumerate(sorted(files)):
        into = held_out if index % _HELD_OUT == _HELD_OUT - 1 else train
        if len(into) < _MAX_BYTES:
            with file.open("rb") as data:
                into += data.read(_MAX_BYTES)
    if not held_out:  # too few files
        cut = len(train) - len(train) // _HELD_OUT
        train, held_out = train[:cut], train[cut:]
    return train, held_out
