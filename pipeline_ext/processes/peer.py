"""Another process, and the tag under which this one exchanges messages with it."""

from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from .connections import Connections


class Peer(NamedTuple):
    """Another process and a tag. Messages with the same tag keep their order.

    Attributes:
        rank: the other process's rank among ``connections``.
        tag: the messages' tag; ``tag + 1`` is this peer's too.
        name: the other process's name for error messages.
    """

    connections: Connections
    rank: int
    tag: int
    name: str

    def send(self, tensor: Tensor, second_tag: bool = False) -> dist.Work:
        """Begins to send ``tensor``."""
        return self.connections.send([tensor], self.rank, self.tag + second_tag)

    def recv(self, tensor: Tensor, second_tag: bool = False) -> dist.Work:
        """Posts a receive into ``tensor``."""
        return self.connections.recv([tensor], self.rank, self.tag + second_tag)
