"""The messages from one stage to another in each step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Flow(NamedTuple):
    """What one stage sends another.

    Attributes:
        where: the boundary or skip connection, for error messages.
        what: "activations" or "gradients".
        receiver: stage.
        groups: the microbatches of each message, in the order in which the messages are sent.
        wire: type that floating-point tensors are sent as; None: their own.
        in_flight: microbatches that the earlier of the two stages may hold at once.
    """

    where: str
    what: str
    receiver: int
    groups: Sequence[Sequence[int]]
    wire: torch.dtype | None
    in_flight: int

    @property
    def room(self) -> int:
        """Messages whose results the earlier stage may hold at once, and the one in transit."""
        return -(-self.in_flight // max(map(len, self.groups))) + 2

    def describe(self, index: int) -> str:
        """A message, for error messages."""
        group = ", ".join(map(str, self.groups[index]))
        plural = "es" if len(self.groups[index]) > 1 else ""
        return f"the {self.what} of microbatch{plural} {group} {self.where}"
