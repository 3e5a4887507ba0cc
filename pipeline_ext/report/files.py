"""Report files: which are accepted, and that each is written whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from ..errors import InvalidArgument, PipelineError


def accepted_path(path: str | os.PathLike, suffixes: Sequence[str]) -> Path:
    """``path``, whose suffix, in lower or upper case, is one of ``suffixes``.

    Raises InvalidArgument for anything else.
    """
    if not isinstance(path, (str, os.PathLike)) or Path(path).suffix.lower() not in suffixes:
        *others, last = suffixes
        raise InvalidArgument(
            f"the path is {str(path)!r}; give one that ends in {', '.join(others)} or {last}"
        )
    return Path(path)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes its place at ``path`` once the block has ended without an error.

    Makes the folders it lies in. Raises PipelineError where it cannot be written; then what was at
    ``path`` is still there.
    """
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with unfinished.open("xb") as file:
                yield file
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise PipelineError(f"{str(path)!r} cannot be written: {error}") from error
