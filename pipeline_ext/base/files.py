"""Files and folders that are written whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import PipelineError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` at the end of the block; a crash leaves one of the two.

    Makes the folders it lies in. Raises PipelineError where it cannot be written.
    """
    path = Path(os.path.realpath(path))  # through a link, the file it points to
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        raise PipelineError(f"{str(path)!r} cannot be written: {error}; what was there is unchanged") from error


def put_folder(new: Path, path: Path) -> None:
    """Gives the folder ``new`` the name ``path``, and removes what had it; a crash leaves one of the two.

    Which of them, and where, ``folder_at`` tells. Raises OSError.
    """
    before = _before(path)
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(path, before)  # no folder can be replaced by another in one go
    os.replace(new, path)
    _sync(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def folder_at(path: Path) -> Path | None:
    """Where the last folder is that was put at ``path``; None: there is none."""
    return next((folder for folder in (path, _before(path)) if folder.is_dir()), None)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def _sync(folder: Path) -> None:
    """Makes new names in it outlive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
