"""The two ends of a way between processes for results on a GPU: messages pass through the host's memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .message import Leaves
from .remote import Incoming, Line, Outgoing, Way

_HOST = torch.device("cpu")


class StagedOutgoing(Outgoing):
    """The sender's end. To copy a result to the host waits for what computes it."""

    def send(self, m: int, leaves: Leaves) -> None:
        super().send(m, [_on(leaf, _HOST) for leaf in leaves])


class StagedIncoming(Incoming):
    """The receiver's end."""

    def __init__(self, line: Line, way: Way, tasks: Sequence[int], device: torch.device) -> None:
        """``device``: where the results are wanted."""
        super().__init__(line, way, tasks)
        self._device = device

    def receive(self, m: int) -> Leaves:
        return [_on(leaf, self._device) for leaf in super().receive(m)]


def _on(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().to(device).requires_grad_(leaf.requires_grad)
