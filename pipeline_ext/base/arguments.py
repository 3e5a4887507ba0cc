"""Checks the arguments of pipelines and plans; says what was given and what is accepted.

Plans need no torch, so the functions that do import it themselves.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument

if TYPE_CHECKING:
    import torch


def count(name: str, value: Any, most: int = 2**31 - 1) -> int:
    """``value`` as a whole number from 1 to ``most``; raises InvalidArgument."""
    number = _whole(value)
    if number > most:
        raise InvalidArgument(f"{name} is {_shown(number)}; give a whole number from 1 to {most}")
    if number < 1:
        raise InvalidArgument(f"{name} is {_shown(value)}; give a whole number of at least 1")
    return number


def counts(name: str, value: Any) -> list[int]:
    """``value``, a whole number of at least 1 or several, as a list; raises InvalidArgument."""
    given = value if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else [value]
    return [count(name, number) for number in given]


def check_between(name: str, value: Any, least: float, most: float) -> None:
    """Raises InvalidArgument for what is no number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise InvalidArgument(f"{name} is {_shown(value)}; give a number from {least:g} to {most:g}")


def check_seed(value: Any) -> None:
    """Raises InvalidArgument for what is no seed of random numbers."""
    if not isinstance(value, int) or not 0 <= value < 2**64:
        raise InvalidArgument(f"seed is {_shown(value)}; give a whole number from 0 on, below 2**64")


def _shown(value: Any) -> str:
    """``value`` for an error, which stays a sentence whatever was given."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def encodable(text: str) -> str:
    """``text`` with a ``?`` for what UTF-8 and so C++ cannot hold: a lone half of a surrogate pair."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def check_dimension(name: str, value: Any) -> None:
    """Raises InvalidArgument for what is not the number of a dimension, from 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidArgument(f"{name} is {_shown(value)}; give the number of a dimension, from 0")


def _whole(value: Any) -> int:
    """``value`` if it is a whole number, else 0."""
    return _index(value) or 0


def _index(value: Any) -> int | None:
    """``value`` if it is a whole number, else None."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def check_type(name: str, value: Any, accepted: type) -> None:
    """Raises InvalidArgument for a value of another type."""
    if not isinstance(value, accepted):
        raise InvalidArgument(f"{name} is {_shown(value)}; give a {accepted.__name__}")


def packs(name: str, value: Any, boundaries: int, microbatches: int) -> list[int] | None:
    """K by boundary: how many microbatches' results go into one message. None for "auto".

    ``value`` is "auto", a number, "all", or a mapping from boundaries to numbers or "all"; a boundary that the
    mapping lacks has K = 1. Raises InvalidArgument.
    """
    if isinstance(value, str) and value == "auto":
        return None
    accepted = f'give a number from 1 to the {microbatches} microbatches, "all" of them'
    if isinstance(value, Mapping):
        _check_boundaries(name, value, boundaries)
        return [
            _pack(f"{name} at boundary {b}", value.get(b, 1), microbatches, f"{accepted}, or leave it out")
            for b in range(boundaries)
        ]
    accepted += ', "auto", or a dict from boundaries to numbers'
    return [_pack(name, value, microbatches, accepted)] * boundaries


def _pack(name: str, value: Any, microbatches: int, accepted: str) -> int:
    if isinstance(value, str) and value == "all":
        return microbatches
    number = _whole(value)
    if not 1 <= number <= microbatches:
        raise InvalidArgument(f"{name} is {_shown(value)}; {accepted}")
    return number


def pack_skips(value: Any, names: Sequence[str], microbatches: int) -> list[int]:
    """K by skip connection: how many microbatches' tensors go into one message.

    ``value`` maps names of skips to numbers or "all"; a skip that it lacks has K = 1. Raises InvalidArgument.
    """
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"pack_skips is {_shown(value)}; give a dict from names of skips to numbers")
    for name in value:
        if name not in names:
            there = f"those between stages are {list(names)}" if names else "no skip leaves its stage"
            raise InvalidArgument(f"pack_skips names the skip {name!r}; {there}")
    accepted = f'give a number from 1 to the {microbatches} microbatches, "all" of them, or leave it out'
    return [_pack(f"pack_skips of {name!r}", value.get(name, 1), microbatches, accepted) for name in names]


def wires(name: str, value: Any, boundaries: int) -> "list[torch.dtype | None]":
    """The type of the results in messages, by boundary. Raises InvalidArgument.

    ``value`` is a floating-point type, None for the results' own type, or a mapping from boundaries to these.
    """
    from .tensors import FLOATING

    if isinstance(value, Mapping):
        _check_boundaries(name, value, boundaries)
        found = [value.get(b) for b in range(boundaries)]
    else:
        found = [value] * boundaries
    for wire in found:
        if wire is not None and wire not in FLOATING:
            names = ", ".join(str(dtype) for dtype in FLOATING)
            raise InvalidArgument(f"{name} is {wire!r}; give one of {names}, or None")
    return found


def _check_boundaries(name: str, value: Mapping, boundaries: int) -> None:
    for b in value:
        if isinstance(b, bool) or not isinstance(b, int) or not 0 <= b < boundaries:
            raise InvalidArgument(
                f"{name} names the boundary {b!r}; boundary b is between stages b and b + 1, and there are "
                + (f"those from 0 to {boundaries - 1}" if boundaries else "none")
            )


def in_flight(value: Any, num_stages: int) -> list[int]:
    """The most microbatches that each stage may hold at once; empty for None. Raises InvalidArgument."""
    if value is None:
        return []
    accepted = f'a whole number of at least 1, a list of one for each of the {num_stages} stages, or "auto"'
    by_stage = [value] * num_stages if _whole(value) > 0 else value
    return numbers("in_flight", by_stage, num_stages, accepted)


def numbers(name: str, value: Any, length: int, accepted: str, most: int = 2**31 - 1) -> list[int]:
    """``value`` as ``length`` whole numbers from 1 to ``most``, or empty. Raises InvalidArgument otherwise."""
    found = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
    if (
        not isinstance(found, Sequence)
        or len(found) not in (0, length)
        or not all(1 <= _whole(number) <= most for number in found)
    ):
        raise InvalidArgument(f"{name} is {_shown(value)}; give {accepted}")
    return [_whole(number) for number in found]


def size(name: str, value: Any, most: int = 2**31 - 1) -> int:
    """``value`` as a whole number from 0 to ``most``; raises InvalidArgument."""
    number = _index(value)
    if number is None or not 0 <= number <= most:
        raise InvalidArgument(f"{name} is {_shown(value)}; give a whole number from 0 to {most}")
    return number


def sizes(name: str, value: Any) -> list[int]:
    """``value``, whole numbers from 0 in a sequence or an array, as a list; raises InvalidArgument."""
    found = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes)):
        raise InvalidArgument(f"{name} is {_shown(value)}; give a list of whole numbers of at least 0")
    return [size(f"{name}[{index}]", number) for index, number in enumerate(found)]


def check_trains(has_loss: bool, losses: Any, target: Any) -> None:
    """Raises InvalidArgument for a call of ``step`` that could not train."""
    import torch

    from .tensors import differentiable

    if not has_loss:
        raise InvalidArgument(
            "step needs a loss: give loss_fn= to Pipeline, as in "
            "Pipeline(..., loss_fn=torch.nn.functional.cross_entropy); eval() needs none"
        )
    if not torch.is_grad_enabled():
        raise InvalidArgument(
            "step computes gradients, but was called where they are off (torch.no_grad or "
            "inference_mode); call it outside, or use eval()"
        )
    if losses is not None and not isinstance(losses, list):
        raise InvalidArgument(f"losses is a {type(losses).__name__}; give a list, which step fills")
    if differentiable(target):
        raise InvalidArgument(
            "target requires a gradient, and step computes none for targets; detach it, or make it an input of "
            "the model"
        )


def check_waits(mesh: Any, num_stages: int | None, cuts: Any) -> None:
    """Raises InvalidArgument for a pipeline whose model cannot wait for the first batch."""
    if mesh is not None:
        raise InvalidArgument(
            "a model with a forward of its own is cut by the calls that it makes, and with mesh= each process "
            "must see them before the first step; give a batch as sample=, on the meta device if you like"
        )
    if num_stages is None and cuts is None:
        raise InvalidArgument("num_stages is missing: say into how many stages to cut the model")


def check_rows(rows: int, microbatches: int) -> None:
    """Raises InvalidArgument for a batch with fewer rows than microbatches."""
    if rows == 0:
        raise InvalidArgument("the batch has no rows")
    if rows < microbatches:
        raise InvalidArgument(
            f"the batch has {rows} rows, too few for {microbatches} microbatches; give a larger batch, leave a "
            f"short last one out (DataLoader(..., drop_last=True)), or Pipeline(..., microbatches={rows})"
        )
