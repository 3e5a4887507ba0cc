"""A message's description as bytes, for a receiver that does not know it yet: JSON, not pickle."""

import json
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..base.memory import Look
from ..errors import PipelineError
from .cast import Cast
from .description import Description, Part
from .format import AsIs, Format

_PLAIN = (bool, int, float, str, type(None))


def encode(description: Description, wire: torch.dtype | None) -> Tensor:
    """The description as uint8. Raises PipelineError for a value between the tensors that JSON cannot hold."""
    format = description.format
    described = {
        "wire": _name(wire) if isinstance(format, Cast) else None,
        "looks": [[_name(look.dtype), *look[1:]] for look in format.looks],
        "regions": format.region_sizes if isinstance(format, AsIs) else [],
        "requires_grad": description.requires_grad,
        "parts": [[[_leaf(leaf) for leaf in part.rest], part.numbers] for part in description.parts],
    }
    return torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)


def decode(data: Tensor) -> Description:
    """The description that ``encode`` was given."""
    described = json.loads(data.numpy().tobytes())
    looks = [
        Look(getattr(torch, dtype), torch.Size(shape), tuple(stride), *rest)
        for dtype, shape, stride, *rest in described["looks"]
    ]
    format: Format
    if described["wire"] is None:
        format = AsIs(looks, described["regions"])
    else:
        like = [torch.empty(look.shape, dtype=look.dtype) for look in looks]
        format = Cast(like, looks, getattr(torch, described["wire"]))
    parts = [
        Part([_read(leaf) for leaf in rest], [(i, number) for i, number in numbers])
        for rest, numbers in described["parts"]
    ]
    return Description(format, described["requires_grad"], parts)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _leaf(leaf: Any) -> Any:
    if type(leaf) in _PLAIN:
        return {"value": leaf}
    if isinstance(leaf, pytree.TreeSpec):
        try:
            return {"spec": pytree.treespec_dumps(leaf)}
        except Exception as error:
            why = f"its structure {leaf} has no text form: {error}"
    else:
        why = f"a {type(leaf).__name__} is neither a tensor nor a number, text, boolean or None"
    raise PipelineError(
        f"what a stage hands to another process cannot be described there: {why}; between processes pass "
        "tensors and plain values in tuples, lists and dicts"
    )


def _read(leaf: dict[str, Any]) -> Any:
    return leaf["value"] if "value" in leaf else pytree.treespec_loads(leaf["spec"])
