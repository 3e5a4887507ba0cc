"""What code keeps in modules, and writes to its arguments, while a forward runs."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..microbatches.opaque import held_tensors

Path = tuple[Any, ...]
Attributes = dict[tuple[nn.Module, str], Any]

_TABLES = {"_parameters", "_buffers", "_modules", "_compiled_call_impl"}


def attributes_of(modules: Iterable[nn.Module]) -> Attributes:
    """The attributes of these modules, without their parameters, buffers, children and hooks."""
    return {
        (module, name): value
        for module in modules
        for name, value in module.__dict__.items()
        if name not in _TABLES and not name.endswith("_hooks")
    }


def changes(before: Mapping[Any, Any], after: Attributes) -> Iterator[tuple[nn.Module, str, Any]]:
    """The attributes whose values hold tensors and were set in between."""
    for (module, name), value in after.items():
        if before.get((module, name), _NOTHING) is not value and next(held_tensors(value), None) is not None:
            yield module, name, value


_NOTHING = object()


class _Identity(int):
    """Stands for an object."""


def state_of(modules: Iterable[nn.Module]) -> list[Any]:
    """What the code of these modules may have kept in them: their attributes, by identity or value."""
    return [
        (module, name, value if isinstance(value, (int, float, str)) else _Identity(id(value)))
        for module in modules
        for table in (module.__dict__, module._buffers)
        for name, value in table.items()
    ]


def entries_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The entries that hold tensors, of the lists and dicts among the arguments of a call, by path."""
    if isinstance(value, MutableMapping):
        items: Iterable[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        return
    of_caller = len(path) < 2  # the tuple and the dict of the arguments themselves are the call's own
    for key, inside in items:
        if not (of_caller or isinstance(value, tuple)) and any(
            isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inside)
        ):
            yield (*path, key), inside
        if not isinstance(inside, Tensor):
            yield from entries_of(inside, (*path, key))
