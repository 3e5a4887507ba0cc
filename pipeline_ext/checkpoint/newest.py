"""Finds the checkpoint to go on from, among several."""

import os
import warnings
from pathlib import Path

from ..errors import InvalidArgument
from ..processes.gather import from_first, rank_and_size
from . import manifest
from .reading import check_files
from .together import together


def newest_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint among the folders in ``folder``; None if there is none.

    All processes of torch.distributed call it together; process 0 compares files with their checksums, newest
    checkpoint first. Warns of each that it skips because it is damaged. Example::

        path = pe.newest_checkpoint("run")  # run/step-100, run/step-200, ...
        step = 0 if path is None else pe.load_checkpoint(path, pipe, optimizer)["step"]

    Raises PipelineError if ``folder`` cannot be read. A folder that is not there has none.
    """
    found = None
    with together(f"the checkpoints in {str(folder)!r} cannot be looked through"):
        if rank_and_size()[0] == 0:
            found = _newest(Path(folder))
    name = from_first(None if found is None else found.name)
    return None if name is None else Path(folder) / name


def _newest(folder: Path) -> Path | None:
    whole = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (path / manifest.NAME).exists():
            try:
                whole.append((manifest.read(path), path))
            except InvalidArgument as error:
                _skip(path, error)
    for found, path in sorted(whole, key=lambda each: each[0].saved, reverse=True):
        try:
            check_files(path, found)
            return path
        except InvalidArgument as error:
            _skip(path, error)
    return None


def _skip(path: Path, error: InvalidArgument) -> None:
    warnings.warn(f"the checkpoint {str(path)!r} is skipped: {error}", stacklevel=4)
