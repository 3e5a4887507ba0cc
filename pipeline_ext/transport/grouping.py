"""Results that wait for the others of their message."""

from collections.abc import Sequence

from .description import Leaves


class Grouping:
    """Collects the results of a step's microbatches until those of one message are complete."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        """``groups``: the microbatches of each message."""
        self.groups = groups
        self._index = {m: index for index, group in enumerate(groups) for m in group}
        self.clear()

    def clear(self) -> None:
        """Forgets the results of a step."""
        self._waiting: dict[int, dict[int, Leaves]] = {}  # by message, then by microbatch
        self._complete = 0  # messages

    def index(self, m: int) -> int:
        """The number of the message that holds microbatch ``m``."""
        return self._index[m]

    def add(self, m: int, leaves: Leaves) -> list[Leaves] | None:
        """Takes microbatch ``m``'s result; returns its message's results once they are complete."""
        index = self._index[m]
        group = self.groups[index]
        waiting = self._waiting.setdefault(index, {})
        waiting[m] = leaves
        if len(waiting) < len(group):
            return None
        del self._waiting[index]
        self._complete += 1
        return [waiting[m] for m in group]

    def completes(self, m: int) -> bool:
        """Whether microbatch ``m``'s result completes the step's last message."""
        index = self._index[m]
        missing = len(self.groups[index]) - len(self._waiting.get(index, ()))
        return self._complete == len(self.groups) - 1 and missing == 1
