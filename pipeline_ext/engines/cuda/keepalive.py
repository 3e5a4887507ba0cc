"""Keeps memory alive that one stream allocated and another uses.

torch's caching allocator returns a freed block at once to the stream that allocated it. What runs there next
may overwrite what another stream still reads. So a reference is kept until a task is enqueued on the allocating
stream that runs after the last use has ended; the plan's waits say which task that is. Unlike ``record_stream``
this never queries the device, gives the same addresses in every step, and works while a graph is captured.
"""

from typing import Any

from .layout import Position, StreamLayout


class KeepAlive:
    """The references of one step."""

    def __init__(self, layout: StreamLayout) -> None:
        self._layout = layout
        self._held: dict[int, list[Any]] = {}  # by the op before which they are dropped

    def keep(self, value: Any, made: Position, used: Position) -> None:
        """Keeps ``value``, allocated at ``made``, until an op of that stream that runs after ``used``."""
        until = self._layout.streams.first_after(used.op, made.stream)
        self._held.setdefault(until, []).append(value)

    def release(self, op: int) -> None:
        """Drops what was kept until the op of this number, which is about to be enqueued."""
        self._held.pop(op, None)

    def end(self) -> None:
        """Drops everything: the caller's streams wait for all others, and the next step waits for them."""
        self._held = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))
