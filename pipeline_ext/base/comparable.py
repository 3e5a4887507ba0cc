"""Values that can be told apart by comparing them."""

from collections.abc import Hashable
from typing import Any

import torch

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def comparable(value: Any) -> Hashable | None:
    """A key, equal for equal values of one type; None for a value that cannot be compared."""
    return (type(value), value) if isinstance(value, _PLAIN) else None
