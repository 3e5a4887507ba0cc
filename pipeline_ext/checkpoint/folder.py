"""A folder that all processes write together, and that replaces another in one moment."""

import contextlib
import os
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from ..base.files import new_folder, put_folder, remove, remove_unfinished, sync
from ..base.lock import taken
from ..errors import InvalidArgument
from ..processes.gather import from_first, of_all, rank_and_size
from .together import together

_LOCKED = (
    "is saving there; save from one run at a time, or to another path (processes that save one model together "
    "have to be in one group of torch.distributed)"
)


@contextlib.contextmanager
def replacing(
    path: Path,
    what: str,
    held: FileIO,
    alone: bool = False,
    check: Callable[[Path], None] = lambda path: None,
) -> Iterator[Path]:
    """Yields an empty folder, the same in all processes, that replaces ``path`` at the end of the block.

    Meanwhile the first process holds the lock of ``path``, with ``held``, a ``holder``; once it has that, it
    calls ``check(path)``. If the block fails, what was written is removed; after a crash the next save removes
    it. What raises in one process raises in all, as PipelineError or InvalidArgument with ``what``. ``alone``:
    without the other processes.
    """
    is_first = alone or rank_and_size()[0] == 0
    with contextlib.ExitStack() as stack:
        with together(what, alone):
            _check_same(path, alone)
        new = path
        with together(what, alone):
            if is_first:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(taken(held, path.with_name(f".{path.name}.lock"), _LOCKED))
                check(path)
                remove_unfinished(path)
                new = new_folder(path)
                stack.callback(remove, new)
        new = path.with_name(from_first(new.name, alone=alone))
        with together(what, alone):
            if not new.is_dir():
                raise InvalidArgument(
                    f"process {rank_and_size()[0]} does not see the folder {str(new)!r}, which process 0 has "
                    "made; save to a file system that all processes share"
                )
        yield new
        with together(what, alone):
            if is_first:
                sync(new)
                put_folder(new, path)


def _check_same(path: Path, alone: bool) -> None:
    first, *others = of_all(os.fspath(path), alone=alone)
    for number, other in enumerate(others, 1):
        if other != first:
            raise InvalidArgument(
                f"process {number} saves to {other!r} and process 0 to {first!r}; give all processes the same "
                "path"
            )
