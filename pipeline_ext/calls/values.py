"""Results of calls as flat lists, and what stands in for a tensor that is not here."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..base.comparable import comparable
from ..microbatches.opaque import how_to_open


class Look(NamedTuple):
    """The type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def look_of(tensor: Tensor) -> str:
    """The text of a tensor's look."""
    return _text(tensor.dtype, tensor.shape)


@functools.lru_cache(maxsize=4096)
def _text(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{_MARK}{str(dtype).removeprefix('torch.')}{list(shape)}"


_MARK = "\0"  # begins the text of a look, which no other text does


def is_look(value: Any) -> bool:
    """Whether ``value`` is the text of a look."""
    return type(value) is str and value.startswith(_MARK)


@functools.lru_cache(maxsize=4096)
def read_look(text: str) -> Look:
    """The look whose text this is."""
    dtype, _, shape = text.removeprefix(_MARK).rstrip("]").partition("[")
    return Look(getattr(torch, dtype), tuple(int(n) for n in shape.split(",") if n.strip()))


def stand_in(look: Look, device: torch.device) -> Tensor:
    """A tensor that has one element of memory. Its values are such that their use is seen: not a number."""
    return _one(look.dtype, device).expand(look.shape)


@functools.cache
def _one(dtype: torch.dtype, device: torch.device) -> Tensor:
    value: Any
    if dtype.is_floating_point or dtype.is_complex:
        value = float("nan")
    else:
        value = False if dtype is torch.bool else torch.iinfo(dtype).min
    with torch.inference_mode(False), torch.no_grad():
        return torch.full((), value, dtype=dtype, device=device)


def without_memory(tensor: Tensor, is_read: bool) -> Tensor:
    """What is left of a parameter or buffer that another process holds.

    It is on the meta device; unless code around units reads it, so that it must be on the CPU: then it is a
    stand-in, not a number.
    """
    left = tensor.detach().to("meta")
    if is_read:
        left = stand_in(Look(tensor.dtype, tensor.shape), torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        left = nn.Parameter(left, tensor.requires_grad)
    left.__dict__[_ELSEWHERE] = True
    return left


def is_elsewhere(tensor: Tensor) -> bool:
    """Whether another process holds the values of a parameter or buffer."""
    return tensor.is_meta or _ELSEWHERE in tensor.__dict__


_ELSEWHERE = "_of_another_process"


class Missing:
    """In place of an object, no tensor, that is in another stage."""

    def __init__(self, what: str, kind: str, opens: str) -> None:
        self.__dict__["_why"] = (
            f"{what} returned a {kind} in another stage of the pipeline, and torch's pytrees do not see what "
            f"it holds, so it cannot be sent; {opens}"
        )

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(self._why)

    def __getitem__(self, key: Any) -> Any:
        raise TypeError(self._why)

    def __repr__(self) -> str:
        return f"<missing: {self._why}>"


class Leaf(NamedTuple):
    """A leaf of a call's result."""

    kind: str  # "tensor", "plain", "argument" or "missing"
    value: Any = None  # plain: the value; argument: its number; missing: what stands in for it


def describe_leaves(name: str, leaves: list[Any], arguments: list[Any]) -> list[Leaf]:
    """What the leaves of a result are. ``name``: of the unit; ``arguments``: the leaves that it was given."""
    numbers = {id(value): number for number, value in enumerate(arguments)}

    def described(leaf: Any) -> Leaf:
        if isinstance(leaf, Tensor):
            return Leaf("tensor")
        if comparable(leaf) is not None:
            return Leaf("plain", leaf)
        if id(leaf) in numbers:
            return Leaf("argument", numbers[id(leaf)])
        return Leaf("missing", Missing(name, type(leaf).__name__, how_to_open(leaf)))

    return [described(leaf) for leaf in leaves]


def copied(value: Any) -> Any:
    """A pytree with copies of its tensors. What was one tensor, or the same part of one, is one again."""
    copies: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        key: Any = id(tensor)
        if type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in copies:
            copies[key] = tensor.clone()
        return copies[key]

    return pytree.tree_map_only(Tensor, copy, value)
