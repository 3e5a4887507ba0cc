"""Moves results across a boundary between processes that have a GPU each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _C
from . import torch_side
from .device_copy import DeviceCopy
from .keepalive import KeepAlive
from .layout import StreamLayout
from .nccl import Pair


class Crossing(DeviceCopy):
    """This process's end of one direction across one boundary: keeps what is sent or received alive."""

    def __init__(
        self,
        layout: StreamLayout,
        keepalive: KeepAlive,
        executor: _C.StreamExecutor,
        devices: Sequence[torch.device],
        sender: int,
        receiver: int,
        pair: Pair,
    ) -> None:
        """As ``DeviceCopy``; all ``devices`` are this process's."""
        super().__init__(layout, keepalive, executor, devices, sender, receiver)
        self.stays = False
        self._pair = pair

    def send(self, m: int, results: Sequence[int], buffer: Tensor, nbytes: int) -> None:
        """As ``transport.stream_remote.StreamConnection``; the current stream is that of the copy, as below."""
        if nbytes:
            self._pair.send(buffer[:nbytes])
        packed = max(self._made[m] for m in results)
        self._keepalive.keep(buffer, packed, self._copies[m])

    def receive(self, m: int, results: Sequence[int], nbytes: int, sent_nbytes: int) -> Tensor:
        buffer = torch_side.empty(nbytes, self._to)
        if sent_nbytes:
            self._pair.receive(buffer[:sent_nbytes])
        self._keepalive.keep(buffer, self._copies[m], self._last_use(results))
        return buffer
