"""Keeps memory alive that one stream allocated and another uses.

torch's caching allocator returns a freed block at once to the stream that allocated it. What runs there next
may overwrite what another stream still reads. So a reference is kept until a task is enqueued on the allocating
stream that runs after the last use has ended; the plan's waits say which task that is. Unlike ``record_stream``
this never queries the device, gives the same addresses in every step, and works while a graph is captured.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...base.flat import is_flat
from ...base.tensors import dense_parts
from .layout import Position, StreamLayout


class KeepAlive:
    """The references of one step."""

    def __init__(self, layout: StreamLayout) -> None:
        self._layout = layout
        self._held: dict[int, list[Any]] = {}  # by the op before which they are dropped
        # By storage: the streams from which it was handed on. A value that several stages hand on unchanged was
        # allocated by the first; which of them that was cannot be seen, so the memory is kept for all.
        self._streams: dict[int, set[int]] = {}

    def keep(self, value: Any, made: Position, used: Position) -> None:
        """Keeps ``value``, which was made or handed on at ``made``, until its memory may be used again.

        That is when an op runs after ``used`` on the stream that allocated it.
        """
        streams = {made.stream}
        for storage in _storages(value):
            known = self._streams.setdefault(storage, set())
            known.add(made.stream)
            streams |= known
        for stream in streams:
            until = self._layout.streams.first_after(used.op, stream)
            self._held.setdefault(until, []).append(value)

    def release(self, op: int) -> None:
        """Drops what was kept until the op of this number, which is about to be enqueued."""
        self._held.pop(op, None)

    def end(self) -> None:
        """Drops everything: the caller's streams wait for all others, and the next step waits for them."""
        self._held = {}
        self._streams = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))


def _storages(value: Any) -> Iterator[int]:
    """The storages of the tensors in a value, each by a number that is its own while it lives."""
    flat = tuple(value) if type(value) is list else value
    for leaf in flat if is_flat(flat) else pytree.tree_leaves(value):
        if type(leaf) is Tensor and leaf.layout is torch.strided:
            yield leaf.untyped_storage()._cdata
        elif isinstance(leaf, Tensor):
            for part in dense_parts(leaf):
                yield part.untyped_storage()._cdata
