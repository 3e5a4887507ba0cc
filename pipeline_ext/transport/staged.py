"""Sender and receiver for results on a GPU whose messages are staged through the host's memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..processes.peer import Peer
from .description import Leaves
from .flow import Flow
from .remote_receiver import RemoteReceiver
from .remote_sender import RemoteSender

_HOST = torch.device("cpu")


class StagedSender(RemoteSender):
    """Copies each result to the host first, which waits for the kernels that compute it."""

    def send(self, m: int, leaves: Leaves) -> None:
        super().send(m, [_on(leaf, _HOST) for leaf in leaves])


class StagedReceiver(RemoteReceiver):
    """Copies each result to ``device``."""

    def __init__(self, peer: Peer, flow: Flow, tasks: Sequence[int], device: torch.device) -> None:
        super().__init__(peer, flow, tasks)
        self._device = device

    def receive(self, m: int) -> Leaves:
        return [_on(leaf, self._device) for leaf in super().receive(m)]


def _on(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().to(device).requires_grad_(leaf.requires_grad)
