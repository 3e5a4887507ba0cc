"""Reads the files of a checkpoint, each process what it needs, into memory beside the model."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base import exact_json
from ..errors import InvalidArgument
from . import tensor_files
from .manifest import Manifest
from .pieces import here, room


def check_files(folder: Path, found: Manifest, rank: int = 0, size: int = 1) -> None:
    """Compares files with their checksums: of ``size`` processes, each its share. Raises InvalidArgument."""
    for name in sorted(found.files)[rank::size]:
        tensor_files.check(folder, name, found.files[name])


def check_names(
    found: Manifest, here: Mapping[str, Any], wanted: Collection[str], may_be_left: tuple[str, ...]
) -> None:
    """Raises InvalidArgument, by name, if the checkpoint is not that of the model.

    ``here``: the model's state in this process. ``wanted``: the names that any process reads. Entries whose
    names begin with one of ``may_be_left`` may be left over.
    """
    missing = []
    for name, value in here.items():
        stored = found.tensors.get(name)
        if name not in (found.tensors if isinstance(value, Tensor) else found.values):
            missing.append(name)
        elif stored is not None and stored.shape != tuple(value.shape):
            raise InvalidArgument(
                f"{name!r} has the shape {list(stored.shape)} in it and {list(value.shape)} in the model; "
                "give a model of the same shape"
            )
    if missing:
        raise InvalidArgument(f"it does not hold {_some(missing)}, which the model has; {_ADVICE}")
    kept = {*found.tensors, *found.values} - set(wanted) - found.within_values()
    left = sorted(name for name in kept if not name.startswith(may_be_left))
    if left:
        raise InvalidArgument(f"it holds {_some(left)}, which the model does not have; {_ADVICE}")


_ADVICE = "give the model that was saved"
_SHOWN = 8


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" * (len(names) > _SHOWN)
    return ", ".join(map(repr, names[:_SHOWN])) + more


class Reading:
    """Tensors and values of a checkpoint. The tensors hold zeros until ``finish``."""

    def __init__(self, folder: Path, found: Manifest) -> None:
        self._found = found
        self._reader = tensor_files.Reader(folder)

    def entry(self, name: str, like: Any) -> Any:
        """A tensor, in the type in which it was saved and sharded as ``like``; or a value."""
        if name in self._found.tensors:
            return self._tensor(name, like)
        return self.value(name, self._found.values[name])

    def value(self, name: str, encoded: Any) -> Any:
        """A value that the manifest holds. Raises InvalidArgument if it cannot be one."""
        try:
            return exact_json.decode(encoded, self._tensor)
        except ValueError as error:
            raise InvalidArgument(f"its value {name!r} is damaged: {error}; give another checkpoint") from error

    def finish(self) -> None:
        """Fills all tensors. Raises InvalidArgument, which names the file, if one is damaged."""
        self._reader.read()

    def _tensor(self, name: str, like: Any = None) -> Tensor:
        stored = self._found.tensors[name]
        into = room(stored.dtype, stored.shape, like)
        box, local = here(into)
        self._reader.want(stored, box, local)
        return into
