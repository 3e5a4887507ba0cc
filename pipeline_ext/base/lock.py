"""A lock on a path, held by one live process: the system releases it when that dies."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from ..errors import PipelineError

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of file systems without them


@contextlib.contextmanager
def locked(file: Path, refusal: str) -> Iterator[None]:
    """Holds the lock ``file`` for the block; removes it at the end.

    Raises PipelineError if another process, or another thread, holds it: "process 7 on NAME" and ``refusal``.
    A file that a dead process has left is no lock. A file system without locks lets everybody in.
    """
    with holder() as held, taken(held, file, refusal):
        yield


def holder() -> FileIO:
    """An open file that a lock can be taken with, and whose end releases it.

    A ``with`` statement closes it in C, whenever Ctrl-C comes. A generator would keep the lock for as long as
    anybody keeps the traceback.
    """
    return FileIO(os.devnull)


@contextlib.contextmanager
def taken(held: FileIO, file: Path, refusal: str) -> Iterator[None]:
    """Holds the lock ``file`` until the block ends, or ``held`` is closed. Raises as ``locked`` does."""
    while not _take(held, file, refusal):
        pass
    try:
        yield
    finally:
        if not held.closed:
            file.unlink(missing_ok=True)  # while it is held, so that nobody else's goes


def _take(held: FileIO, file: Path, refusal: str) -> bool:
    """Takes the lock; False if its holder has removed the file in between."""
    opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        os.dup2(opened, held.fileno(), inheritable=False)
    finally:
        os.close(opened)
    opened = held.fileno()
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.pread(opened, 300, 0).decode(errors="replace") or "another process"
        raise PipelineError(f"{who} {refusal}") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    if not _is_at(opened, file):
        return False
    os.ftruncate(opened, 0)
    os.pwrite(opened, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
    return True


def _is_at(opened: int, file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(opened), os.stat(file, follow_symlinks=False))
    return False
