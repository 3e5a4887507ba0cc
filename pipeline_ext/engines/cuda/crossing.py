"""How results cross a boundary to another process, which has a GPU of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _C
from . import torch_side
from .device_copy import Passage
from .keepalive import Custody
from .layout import StreamLayout
from .nccl import Pair


class Crossing(Passage):
    """This process's end of one way across one boundary: keeps what is sent or received in custody."""

    def __init__(
        self,
        layout: StreamLayout,
        custody: Custody,
        executor: _C.StreamExecutor,
        devices: Sequence[torch.device],
        boundary: int,
        way: str,
        pair: Pair,
    ) -> None:
        """As ``Passage``; all ``devices`` are this process's."""
        super().__init__(layout, custody, executor, devices, boundary, way)
        self.stays = False
        self._pair = pair

    def send(self, m: int, results: Sequence[int], buffer: Tensor, nbytes: int) -> None:
        """As ``transport.stream_ends.Crossing``; the current stream is that of the copy, as below."""
        if nbytes:
            self._pair.send(buffer[:nbytes])
        packed = max(self._place(self._made, m) for m in results)
        self._custody.keep(buffer, packed, self._layout.place(*self._sent, m))

    def receive(self, m: int, results: Sequence[int], nbytes: int, sent_nbytes: int) -> Tensor:
        buffer = torch_side.empty(nbytes, self._to)
        if sent_nbytes:
            self._pair.receive(buffer[:sent_nbytes])
        self._custody.keep(buffer, self._layout.place(*self._sent, m), self._last_use(results))
        return buffer
