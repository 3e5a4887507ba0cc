"""Keeps memory alive that one stream allocated and another uses.

torch's caching allocator gives a freed block back to the stream that allocated it, at once: what runs there next
may overwrite what another stream still reads. So a reference is kept until a task is enqueued on the allocating
stream that runs after the last use has ended; the plan's waits say which. Unlike ``record_stream`` this asks the
device nothing, gives the same addresses in every step, and works while a graph is captured.
"""

from typing import Any

from .layout import Position, StreamLayout


class KeepAlive:
    """The references of one step."""

    def __init__(self, layout: StreamLayout) -> None:
        self._layout = layout
        self._held: dict[int, list[Any]] = {}  # by the op before which they are dropped

    def keep(self, value: Any, made: Position, used: Position) -> None:
        """Keeps ``value``, allocated at ``made``, until ``used`` has ended where the memory would be reused."""
        until = self._layout.streams.first_after(used.op, made.stream)
        self._held.setdefault(until, []).append(value)

    def release(self, op: int) -> None:
        """Drops what was kept until the op of this number, which is about to be enqueued."""
        self._held.pop(op, None)

    def end(self) -> None:
        """Drops everything: the caller's streams follow all others, and the next step follows them."""
        self._held = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))
