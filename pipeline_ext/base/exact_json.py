"""Python values as JSON and back, without a difference and without running code.

None, booleans, integers, finite floats, text and lists are themselves. Any other value is an object with one
key, its kind. Tensors are written elsewhere, and stand here by a name.
"""

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument
from .dtypes import DTYPES, NAMES

_LONGEST = 8192  # bits of an integer; Python refuses to read much longer ones
_KEPT = "tensors, numbers, text, bytes, lists, tuples, sets and dicts"


def encode(value: Any, name: str, put: Callable[[Tensor], str] | None = None) -> Any:
    """A value that ``json.dumps`` takes, for ``value``.

    ``name`` is that of the value, for errors. ``put`` keeps a tensor and returns its name; None: a tensor is
    refused. Raises InvalidArgument for what cannot be kept exactly, with its place in the value.
    """
    try:
        return _encode(value, name, put)
    except RecursionError:
        raise InvalidArgument(f"{name!r} holds itself, or is nested too deeply to be kept") from None
    except KeyError as error:
        raise InvalidArgument(f"{name!r} holds {error}, a type of tensors that cannot be kept") from None


def _encode(value: Any, place: str, put: Callable[[Tensor], str] | None) -> Any:
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int and value.bit_length() <= _LONGEST:
        return value
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind is list:
        return [_encode(item, f"{place}[{i}]", put) for i, item in enumerate(value)]
    if kind in (Tensor, nn.Parameter) and put is not None:
        return {"tensor": put(value)}
    for name, (of_kind, plain, _) in _KINDS.items():
        if kind is of_kind:
            return {name: _encode(plain(value), place, put)}
    if kind in _TABLES.values():
        (name,) = (name for name, table in _TABLES.items() if table is kind)
        keys = [_encode(key, f"a key of {place}", put) for key in value]
        items = [_encode(item, f"{place}[{key!r}]", put) for key, item in value.items()]
        return {name: list(zip(keys, items))}
    given = (
        f"an int of {value.bit_length()} bits" if kind is int else f"a {kind.__module__}.{kind.__qualname__}"
    )
    raise InvalidArgument(
        f"{place!r} is {given.replace('builtins.', '')}, which cannot be kept without running code when it is "
        f"read; give {_KEPT}, as a state_dict() holds them"
    )


def decode(encoded: Any, take: Callable[[str], Tensor] | None = None) -> Any:
    """The value that ``encode`` was given. ``take`` returns the tensor that ``put`` kept under a name.

    Raises ValueError if ``encode`` cannot have written it. What ``take`` raises as ValueError goes through.
    """
    try:
        return _decode(encoded, take)
    except (TypeError, LookupError, RecursionError, RuntimeError, OverflowError, AttributeError) as error:
        raise ValueError(f"it is no value that was written: {error}") from error


def _decode(encoded: Any, take: Callable[[str], Tensor] | None) -> Any:
    if isinstance(encoded, list):
        return [_decode(item, take) for item in encoded]
    if not isinstance(encoded, dict):
        return encoded
    ((name, content),) = encoded.items()
    if name == "tensor":
        if take is None or type(content) is not str:
            raise ValueError("a tensor stands where none can be")
        return take(content)
    if name == "float":
        return _FLOATS[content]
    if name in _TABLES:
        pairs = [(_decode(key, take), _decode(value, take)) for key, value in content]
        return _TABLES[name](pairs) if name != "counter" else Counter(dict(pairs))
    _, _, read = _KINDS[name]
    return read(_decode(content, take))


_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# Kind -> its type, what is written of a value, and how that is read.
_KINDS: Mapping[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "complex": (complex, lambda value: [value.real, value.imag], lambda parts: complex(*parts)),
    "bytes": (
        bytes,
        lambda value: base64.b64encode(value).decode("ascii"),
        lambda text: base64.b64decode(text, validate=True),
    ),
    "tuple": (tuple, list, tuple),
    "set": (set, list, set),
    "frozenset": (frozenset, list, frozenset),
    "size": (torch.Size, list, torch.Size),
    "dtype": (torch.dtype, lambda dtype: NAMES[dtype], lambda name: DTYPES[name]),
    "device": (torch.device, str, torch.device),
}
_TABLES: Mapping[str, type[dict]] = {"dict": dict, "ordered": OrderedDict, "counter": Counter}
