"""Results that cross a boundary within one process."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .buffers import Buffers
from .description import Leaves
from .format import Format
from .grouping import Grouping
from .link import FREE_LINK, LocalLink
from .message import Message, Result, nbytes_of, prepare


class StreamMemory(Protocol):
    """Manages a channel's memory where sender and receiver run on device streams.

    Attributes:
        stays: whether both are on one device. If not, each message is copied to the receiver's.
    """

    stays: bool

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """As ``Buffers``."""

    def give_back(self, buffer: Tensor) -> None:
        """As ``Buffers``."""

    def handed_over(self, m: int, value: Any) -> None:
        """Keeps ``value`` alive: the receiver uses the sender's own tensors."""

    def packed(self, results: dict[int, Any], buffer: Tensor) -> None:
        """Keeps these results, by microbatch, and ``buffer`` alive: they were packed into it just now."""

    def copy(self, m: int, results: Sequence[int], buffer: Tensor, nbytes: int) -> Tensor:
        """A buffer of the same size on the receiver's device, with the first ``nbytes`` copied.

        ``m``: the microbatch whose task copies. ``results``: the microbatches whose results it holds.
        """


class Channel:
    """Carries the results of one stage to a neighbor: those of ``pack`` microbatches in one message.

    A group holds consecutive microbatches; the last group may be smaller. A result that is alone in its
    message, and not cast to a wire type, is handed over itself. ``send`` is for the sender's threads, the rest
    for the receiver's; the plan guarantees that a result is sent before it is received.

    Attributes:
        hands_over: whether results are handed over, not packed.
        sent: messages in this step.
        packed_nbytes: bytes that were packed for them.
        seconds: that the link spent on them.
        result_nbytes: bytes of the first microbatch's result.
    """

    def __init__(
        self,
        microbatches: int,
        pack: int = 1,
        wire: torch.dtype | None = None,
        in_flight: int = 1,
        link: LocalLink = FREE_LINK,
        stream_memory: StreamMemory | None = None,
    ) -> None:
        """``in_flight``: results that may be in transit or in use at once."""
        self.hands_over = pack == 1 and wire is None and (stream_memory is None or stream_memory.stays)
        self._grouping = Grouping(
            [range(first, min(first + pack, microbatches)) for first in range(0, microbatches, pack)]
        )
        self._wire = wire
        self._link = link
        self._stream_memory = stream_memory
        self._buffers = stream_memory or Buffers(min(-(-microbatches // pack), -(-in_flight // pack) + 1))
        self._known: dict[int, Format] = {}  # by group
        self._replaced: list[Format | None] = []  # in this step: streams may still read their tables
        self.begin()

    @property
    def packs(self) -> bool:
        """Whether a packer writes the messages."""
        return not self.hands_over

    @property
    def formats(self) -> list[Format]:
        """Those of the last step's messages."""
        return list(self._known.values())

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()
        self._replaced = []
        self.sent = 0
        self.packed_nbytes = 0
        self.seconds = 0.0
        self.result_nbytes = 0

    def forget(self) -> None:
        """Packs the next step like the first."""
        self._known = {}

    def end(self) -> None:
        """Frees what a failed step has left."""
        self._grouping.clear()
        self._handed_over: dict[int, Leaves] = {}
        self._arrived: dict[int, Result] = {}

    def send(self, m: int, leaves: Leaves) -> None:
        """Takes the result of microbatch ``m``; if that completes its group, sends the message.

        Raises PipelineError for tensors that cannot be packed.
        """
        if m == 0:
            self.result_nbytes = nbytes_of(leaves)
        if self.hands_over:
            self._handed_over[m] = leaves
            if self._stream_memory is not None:
                self._stream_memory.handed_over(m, leaves)
        else:
            results = self._grouping.add(m, leaves)
            if results is None:
                return
            self._send_message(self._grouping.index(m), results)
        self.sent += 1
        self.seconds += self._link.send()

    def transfer(self, m: int) -> None:
        """Copies the message with microbatch ``m``'s result to the receiver's device, if it is not there."""
        memory = self._stream_memory
        if memory is None or memory.stays:
            return
        message = self._arrived[m].message
        if not message.is_copied:
            group = self._grouping.groups[self._grouping.index(m)]
            message.buffer = memory.copy(m, group, message.buffer, message.description.format.sent_nbytes)
            message.is_copied = True

    def receive(self, m: int) -> Leaves:
        """The result of microbatch ``m``, to be called once."""
        return self._handed_over.pop(m) if self.hands_over else self._arrived[m].leaves()

    def release(self, m: int) -> None:
        """Frees what was received for microbatch ``m``."""
        result = self._arrived.pop(m, None)
        if result is not None and result.message.release():
            self._buffers.give_back(result.message.buffer)

    def _send_message(self, index: int, results: list[Leaves]) -> None:
        known = self._known.get(index)
        prepared = prepare(results, self._wire, known)
        description = prepared.description
        if description.format is not known:
            self._replaced.append(known)
            self._known[index] = description.format
        device = prepared.tensors[0].device if prepared.tensors else torch.device("cpu")
        buffer = self._buffers.take(description.format.nbytes, device)
        prepared.pack(buffer)
        group = self._grouping.groups[index]
        if self._stream_memory is not None:
            self._stream_memory.packed(dict(zip(group, results)), buffer)
        message = Message(description, buffer)
        for m, part in zip(group, description.parts):
            self._arrived[m] = Result(message, part)
        self.packed_nbytes += description.format.sent_nbytes
