"""One way across a boundary between stages."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .buffers import Buffers
from .format import Format
from .link import FREE_LINK, LocalLink
from .message import Leaves, Message, Result, fill, nbytes_of


class Passage(Protocol):
    """What looks after a channel's memory where sender and receiver run on streams of devices.

    Attributes:
        stays: whether they are on one device. If not, each message is to be carried.
    """

    stays: bool

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """As ``Buffers``."""

    def give_back(self, buffer: Tensor) -> None:
        """As ``Buffers``."""

    def handed_over(self, m: int, value: Any) -> None:
        """The receiver uses the sender's own tensors."""

    def packed(self, results: dict[int, Any], buffer: Tensor) -> None:
        """Results, by microbatch, have been packed into ``buffer``, just now."""

    def carry(self, results: Sequence[int], buffer: Tensor, nbytes: int) -> Tensor:
        """A buffer as large on the receiver's device, with its first bytes: these microbatches' results."""


class Channel:
    """Carries the results of one stage to a neighbour: those of ``pack`` microbatches in one message.

    Groups are of consecutive microbatches; the last may be smaller. A result that is alone in its message and
    of no other wire type is handed over itself. ``send`` is for the sender's threads, the rest for the
    receiver's; the plan sees to it that a result is sent before it is received.

    Attributes:
        hands_over: whether results are handed over, not packed.
        sent: messages in this step.
        packed_nbytes: bytes in them that were packed.
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
        passage: Passage | None = None,
    ) -> None:
        """``in_flight``: results that may be on their way or in use at once. ``passage``: between devices."""
        self.hands_over = pack == 1 and wire is None and (passage is None or passage.stays)
        self._microbatches = microbatches
        self._pack = pack
        self._wire = wire
        self._link = link
        self._passage = passage
        self._buffers = passage or Buffers(min(-(-microbatches // pack), -(-in_flight // pack) + 1))
        self._known: dict[int, Format] = {}  # by group
        self._replaced: list[Format | None] = []  # in this step: streams may still read their tables
        self.begin()

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()
        self._replaced = []
        self.sent = 0
        self.packed_nbytes = 0
        self.seconds = 0.0
        self.result_nbytes = 0

    def forget(self) -> None:
        """Packs the next step as the first."""
        self._known = {}

    def end(self) -> None:
        """Lets go of what a step that failed has left on its way."""
        self._waiting: dict[int, dict[int, Leaves]] = {}  # by group, then by microbatch
        self._arrived: dict[int, Leaves | Result] = {}

    def send(self, m: int, leaves: Leaves) -> None:
        """Takes the result of microbatch ``m``; if it completes its group, that leaves now.

        Raises PipelineError for tensors that cannot be packed.
        """
        if m == 0:
            self.result_nbytes = nbytes_of(leaves)
        if self.hands_over:
            self._arrived[m] = leaves
            if self._passage is not None:
                self._passage.handed_over(m, leaves)
            self._through_link()
            return
        group = m // self._pack
        waiting = self._waiting.setdefault(group, {})
        waiting[m] = leaves
        if len(waiting) == min(self._pack, self._microbatches - group * self._pack):
            self._send_group(group, self._waiting.pop(group))
            self._through_link()

    def carry(self, m: int) -> None:
        """Takes the message that microbatch ``m``'s result is in to the receiver's device, if it is another."""
        if self._passage is not None and not self._passage.stays:
            message = self._arrived[m].message
            nbytes = message.contents.format.sent_nbytes
            message.buffer = self._passage.carry(self._group_of(m), message.buffer, nbytes)

    def receive(self, m: int) -> Leaves:
        """The result of microbatch ``m``, to be called once."""
        result = self._arrived[m]
        if isinstance(result, Result):
            return result.leaves()
        del self._arrived[m]
        return result

    def release(self, m: int) -> None:
        """Microbatch ``m``'s result is needed no more."""
        result = self._arrived.pop(m, None)
        if isinstance(result, Result):
            if result.message.read():
                self._buffers.give_back(result.message.buffer)

    def _send_group(self, group: int, results: dict[int, Leaves]) -> None:
        known = self._known.get(group)
        filling = fill(list(results.values()), self._wire, known)
        contents = filling.contents
        if contents.format is not known:
            self._replaced.append(known)
            self._known[group] = contents.format
        device = filling.tensors[0].device if filling.tensors else torch.device("cpu")
        buffer = self._buffers.take(contents.format.nbytes, device)
        filling.pack(buffer)
        if self._passage is not None:
            self._passage.packed(results, buffer)
        message = Message(contents, buffer)
        for m, part in zip(results, contents.parts):
            self._arrived[m] = Result(message, part)
        self.packed_nbytes += contents.format.sent_nbytes

    def _group_of(self, m: int) -> list[int]:
        """The microbatches whose results leave together with that of ``m``."""
        first = m // self._pack * self._pack
        return list(range(first, min(first + self._pack, self._microbatches)))

    def _through_link(self) -> None:
        self.sent += 1
        self.seconds += self._link.send()
