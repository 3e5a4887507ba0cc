"""Packing on the CPU, in the native core: no Python for each tensor."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from .. import _C


class Lender(Protocol):
    """Lends its memory through DLPack: torch's tensors, numpy's writable arrays."""

    def __dlpack__(self) -> Any: ...


class SlotLike(Protocol):
    """Where one tensor lies: ``offset`` in bytes; ``wire`` is the type it travels as."""

    offset: int
    shape: Sequence[int]
    dtype: torch.dtype
    wire: torch.dtype


class LayoutLike(Protocol):
    """The slots of a buffer of ``nbytes``."""

    slots: Sequence[SlotLike]
    nbytes: int


def packer(layout: LayoutLike) -> _C.Packer:
    """What packs and unpacks tensors of a layout; make it once, and call it for each message.

    Its methods are ``pack(tensors, buffer)`` and ``unpack(tensors, buffer)``, with options that
    ``help(pipeline_ext._C.Packer)`` tells.
    Raises InvalidArgument for types that cannot travel so, and for slots outside the buffer.
    """
    slots = layout.slots
    return _C.Packer(
        offsets=[slot.offset for slot in slots],
        shapes=[slot.shape for slot in slots],
        dtypes=[_name(slot.dtype) for slot in slots],
        wires=[_name(slot.wire) for slot in slots],
        nbytes=layout.nbytes,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
