"""Values that one process sends another: JSON, so that reading one never runs code."""

import json
from typing import Any

import torch
from torch import Tensor


def encode(value: Any) -> bytes:
    """``value``, which JSON can hold, as at least one byte."""
    return json.dumps(value).encode()


def decode(encoded: bytes) -> Any:
    """The value that ``encode`` was given; tuples have become lists."""
    return json.loads(encoded)


def as_tensor(encoded: bytes) -> Tensor:
    """A uint8 tensor of the bytes, to be sent as a message."""
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of a uint8 tensor."""
    return tensor.numpy().tobytes()
