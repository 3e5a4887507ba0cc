"""Memory that one stream makes and another uses.

torch's allocator gives a freed block out again to the stream that it was made on, at once: what runs there next
may overwrite what another stream still reads. So a reference is kept until a step comes on the first stream
that runs after the last use has ended; the plan's waits say which. Unlike ``record_stream`` this asks the
device nothing, gives the same addresses in every step, and works while a graph is captured.
"""

from typing import Any

from .layout import Place, StreamLayout


class Custody:
    """Of one step."""

    def __init__(self, layout: StreamLayout) -> None:
        self._layout = layout
        self._held: dict[int, list[Any]] = {}  # by the step at whose begin they are let go

    def keep(self, value: Any, made: Place, used: Place) -> None:
        """Holds ``value``, which ``made`` has allocated, until ``used`` has ended where it would be reused."""
        until = self._layout.streams.first_after(used.step, made.stream)
        self._held.setdefault(until, []).append(value)

    def let_go(self, step: int) -> None:
        """This step is about to be enqueued."""
        self._held.pop(step, None)

    def end(self) -> None:
        """The caller's streams follow all others, and the next step follows them."""
        self._held = {}

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))
