"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import PipelineError


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
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # so that the new name outlives a power cut
        finally:
            os.close(folder)
    except OSError as error:
        raise PipelineError(
            f"{str(path)!r} cannot be written: {error}; what was there is unchanged"
        ) from error
