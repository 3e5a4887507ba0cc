"""Writes files and folders whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import PipelineError


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that replaces ``path`` at the end of the block. A crash leaves the old file or the new one.

    Makes the folders above it. Raises PipelineError if the file cannot be written.
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
    """Renames the folder ``new`` to ``path``, and removes the one that was there.

    A crash leaves the old folder or the new one; ``folder_at`` finds it. Raises OSError.
    """
    before = _before(path)
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(path, before)  # one call cannot replace a folder that is not empty
    os.replace(new, path)
    _sync(path.parent)
    shutil.rmtree(before, ignore_errors=True)


def folder_at(path: Path) -> Path | None:
    """The last folder that ``put_folder`` put at ``path``, wherever it is now; None if there is none."""
    return next((folder for folder in (path, _before(path)) if folder.is_dir()), None)


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")


def _sync(folder: Path) -> None:
    """Makes the new names in a folder survive a power cut."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
