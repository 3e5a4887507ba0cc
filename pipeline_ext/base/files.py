"""Writes files and folders whole or not at all."""

import contextlib
import ctypes
import fcntl
import os
import secrets
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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        temporary, file = _begin(path)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)
    except OSError as error:
        raise PipelineError(f"{str(path)!r} cannot be written: {error}; what was there is unchanged") from error


def _begin(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside ``path``, locked while it is written; its name cannot be guessed, nor be a link."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        opened = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        if os.fstat(opened).st_nlink:
            return temporary, os.fdopen(opened, "wb")
        os.close(opened)  # taken for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Removes the files that writers of ``path`` had begun when they died: nobody has them locked."""
    for name in os.listdir(path.parent):
        if name.startswith(f".{path.name}.") and name.endswith(".tmp"):
            with contextlib.suppress(OSError):  # it is locked, gone, or another user's
                abandoned = path.with_name(name)
                opened = os.open(abandoned, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    abandoned.unlink()
                finally:
                    os.close(opened)


def new_folder(path: Path) -> Path:
    """Makes an empty folder beside ``path`` for ``put_folder``, under a name that cannot be guessed."""
    new = path.with_name(f"{_unfinished(path)}{secrets.token_hex(8)}")
    new.mkdir()
    return new


def remove_unfinished(path: Path) -> None:
    """Removes the folders of ``new_folder`` that a crash has left. The caller alone may write ``path`` now."""
    for entry in os.listdir(path.parent):
        if entry.startswith(_unfinished(path)):
            remove(path.with_name(entry))


def put_folder(new: Path, path: Path) -> None:
    """Renames the folder ``new`` to ``path``, and removes the one that was there.

    A crash leaves the old folder or the new one; ``folder_at`` finds it. Raises OSError.
    """
    before = _before(path)
    if path.exists():
        if _exchange(new, path):
            before = new
        else:
            remove(before)
            os.replace(path, before)
            os.replace(new, path)
    else:
        os.replace(new, path)
    sync(path.parent)
    remove(before)


def remove(folder: Path) -> None:
    """Removes a folder as far as it can be. Ctrl-C comes out as itself, also where shutil is closing a file."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise error.__context__ or error from None


def folder_at(path: Path) -> Path | None:
    """The last folder that ``put_folder`` put at ``path``, wherever it is now; None if there is none."""
    return next((folder for folder in (path, _before(path)) if folder.is_dir()), None)


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, survive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps the names of two folders in one call; False where the system or the file system cannot."""
    at_here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        rename = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    return bool(rename(at_here, os.fsencode(one), at_here, os.fsencode(other), exchange) == 0)


def _unfinished(path: Path) -> str:
    return f".{path.name}.saving"


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.before")
