"""One way across a boundary between stages."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .buffers import Buffers
from .link import FREE_LINK, LocalLink
from .message import Format, message_of

Leaves = Sequence[Any]  # tensors, and what goes along as it is


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


class _Message:
    """The results of a group of microbatches in one buffer."""

    def __init__(
        self, format: Format, buffer: Tensor, requires_grad: list[bool], microbatches: list[int]
    ) -> None:
        self._microbatches = microbatches
        self._buffer = buffer
        self._unread = len(microbatches)  # results that are still needed
        self._format = format
        self._requires_grad = requires_grad
        self._tensors: list[Tensor] | None = None

    def tensors(self) -> list[Tensor]:
        if self._tensors is None:
            self._tensors = self._format.open(self._buffer)
            for tensor, needed in zip(self._tensors, self._requires_grad):
                tensor.requires_grad_(needed)
        return self._tensors

    def carry(self, passage: Passage) -> None:
        """Takes it to the receiver's device."""
        self._buffer = passage.carry(self._microbatches, self._buffer, self._format.sent_nbytes)

    def read(self) -> Tensor | None:
        """One more result is needed no more; returns the buffer after the last."""
        self._unread -= 1
        if self._unread > 0:
            return None
        self._tensors = None  # first the views: who takes the buffer next looks whether there are any
        return self._buffer


class _Result:
    """One microbatch's part of a message."""

    def __init__(self, leaves: Leaves, numbers: dict[int, int], message: _Message) -> None:
        self.message = message
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._numbers = [
            (i, numbers[id(leaf)]) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)
        ]

    def leaves(self) -> list[Any]:
        tensors, leaves = self.message.tensors(), list(self._leaves)
        for i, number in self._numbers:
            leaves[i] = tensors[number]
        return leaves


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
        self._formats: dict[int, Format] = {}  # by group
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
        self._formats = {}

    def end(self) -> None:
        """Lets go of what a step that failed has left on its way."""
        self._waiting: dict[int, dict[int, Leaves]] = {}  # by group, then by microbatch
        self._arrived: dict[int, Leaves | _Result] = {}

    def send(self, m: int, leaves: Leaves) -> None:
        """Takes the result of microbatch ``m``; if it completes its group, that leaves now.

        Raises PipelineError for tensors that cannot be packed.
        """
        if m == 0:
            tensors = (leaf for leaf in pytree.tree_leaves(leaves) if isinstance(leaf, Tensor))
            self.result_nbytes = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
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
            self._arrived[m].message.carry(self._passage)

    def receive(self, m: int) -> Leaves:
        """The result of microbatch ``m``, to be called once."""
        result = self._arrived[m]
        if isinstance(result, _Result):
            return result.leaves()
        del self._arrived[m]
        return result

    def release(self, m: int) -> None:
        """Microbatch ``m``'s result is needed no more."""
        result = self._arrived.pop(m, None)
        if isinstance(result, _Result):
            buffer = result.message.read()
            if buffer is not None:
                self._buffers.give_back(buffer)

    def _send_group(self, group: int, results: dict[int, Leaves]) -> None:
        tensors = {
            id(leaf): leaf for leaves in results.values() for leaf in leaves if isinstance(leaf, Tensor)
        }
        numbers = {key: number for number, key in enumerate(tensors)}
        packed = list(tensors.values())
        known = self._formats.get(group)
        format, regions = message_of(packed, self._wire, known)
        if format is not known:
            self._replaced.append(known)
            self._formats[group] = format
        device = packed[0].device if packed else torch.device("cpu")
        buffer = self._buffers.take(format.nbytes, device)
        format.pack(packed, regions, buffer)
        if self._passage is not None:
            self._passage.packed(results, buffer)
        message = _Message(format, buffer, [t.requires_grad for t in packed], list(results))
        for m, leaves in results.items():
            self._arrived[m] = _Result(leaves, numbers, message)
        self.packed_nbytes += format.sent_nbytes

    def _through_link(self) -> None:
        self.sent += 1
        self.seconds += self._link.send()
