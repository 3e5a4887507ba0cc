"""Objects whose inside torch's pytrees do not see."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type)
_MOST = 10_000  # objects that a search looks at


def held_tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in the attributes and entries of an object, at any depth. Modules are not searched."""
    todo: list[Any] = [value]
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        found = todo.pop()
        if isinstance(found, Tensor):
            yield found
        elif not isinstance(found, (*_PLAIN, nn.Module)) and id(found) not in seen:
            seen.add(id(found))
            todo += _inside(found)


def _inside(value: Any) -> list[Any]:
    slots = [name for kind in type(value).__mro__ for name in _names(getattr(kind, "__slots__", ()))]
    held = [getattr(value, name) for name in slots if hasattr(value, name)]
    held += getattr(value, "__dict__", {}).values()
    if isinstance(value, Mapping):
        held += value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        held += value
    return held


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def how_to_open(value: Any) -> str:
    """What makes torch's pytrees see the tensors in ``value``, for error messages."""
    name = type(value).__name__
    if isinstance(value, Mapping):
        return "give dict(...) of it"
    if dataclasses.is_dataclass(value):
        return f"call torch.utils._pytree.register_dataclass({name}) once"
    fields = list(getattr(value, "__dict__", {}))
    return (
        "give a dict of its tensors, or, if its constructor takes them by name, call "
        f"torch.utils._pytree.register_dataclass({name}, field_names={fields}) once"
    )
