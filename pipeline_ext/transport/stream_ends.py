"""The two ends of one way across a boundary between stages of different processes that run on streams.

A message is enqueued to be received where, in the order of all tasks, it is enqueued to be sent, and the
receiver must know its size then. In the first step of a kind its contents are told beforehand, from host to
host; the messages of later ones are the same.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .message import Contents, Leaves, Message, Result, fill, nbytes_of
from .remote import Way


class Crossing(Protocol):
    """What moves a way's messages between processes, and looks after their memory here."""

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A buffer for a message to be packed into, on the current stream."""

    def packed(self, results: dict[int, Any], buffer: Tensor) -> None:
        """Results, by microbatch, have been packed into ``buffer``, just now."""

    def send(self, m: int, results: Sequence[int], buffer: Tensor, nbytes: int) -> None:
        """Sends its first bytes, these microbatches' results, now that it is ``m``'s turn."""

    def receive(self, m: int, results: Sequence[int], nbytes: int, sent_nbytes: int) -> Tensor:
        """A buffer of ``nbytes`` on this process's device, with what ``send`` sends as its first bytes."""


class Catalogue(Protocol):
    """What the messages of a way hold, in steps of the kind that runs."""

    def known(self, index: int) -> Contents | None:
        """Contents of the message with this number, where they have been told."""

    def tell(self, index: int, contents: Contents) -> None:
        """Tells the receiver. Raises PipelineError where it takes others for known."""

    def ask(self, index: int) -> Contents:
        """What the sender tells. Raises PeerError where it does not."""


class StreamOutgoing:
    """The sender's end. Attributes as of ``Channel``; nobody here knows how long messages travel.

    Attributes:
        is_plain: whether each result goes alone, and as it is.
    """

    hands_over = False
    seconds = 0.0

    def __init__(self, way: Way, crossing: Crossing, catalogue: Catalogue, device: torch.device) -> None:
        self._way = way
        self._crossing = crossing
        self._catalogue = catalogue
        self._device = device
        self.is_plain = _is_plain(way)
        self._index = {m: index for index, group in enumerate(way.groups) for m in group}
        self.begin()

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()
        self.sent = 0
        self.packed_nbytes = 0
        self.result_nbytes = 0

    def end(self) -> None:
        """Lets go of what a step that failed has left."""
        self._waiting: dict[int, dict[int, Leaves]] = {}  # by message, then by microbatch
        self._packed: dict[int, tuple[Tensor, int]] = {}  # by message: buffer, and bytes to send

    def completes(self, m: int) -> bool:
        """Whether the step's last message leaves with microbatch ``m``."""
        missing = len(self._way.groups[self._index[m]]) - len(self._waiting.get(self._index[m], ()))
        return self.sent == len(self._way.groups) - 1 and missing == 1

    def send(self, m: int, leaves: Leaves) -> None:
        """Takes the result of microbatch ``m``; if it completes its group, that is packed now.

        Raises PipelineError for what cannot be packed, or is of a shape that the receiver cannot expect.
        """
        if m == 0:
            self.result_nbytes = nbytes_of(leaves)
        index = self._index[m]
        waiting = self._waiting.setdefault(index, {})
        waiting[m] = leaves
        group = self._way.groups[index]
        if len(waiting) == len(group):
            del self._waiting[index]
            self._pack(index, {m: waiting[m] for m in group})

    def carry(self, m: int) -> None:
        """Sends the message that microbatch ``m``'s result is in; the current stream is the way's."""
        index = self._index[m]
        self._crossing.send(m, self._way.groups[index], *self._packed.pop(index))

    def _pack(self, index: int, results: dict[int, Leaves]) -> None:
        known = self._catalogue.known(index)
        filling = fill(list(results.values()), self._way.wire, None if known is None else known.format)
        if not filling.contents.equals(known):
            self._catalogue.tell(index, filling.contents)
        format = filling.contents.format
        buffer = self._crossing.take(format.nbytes, self._device)
        if self.is_plain:
            format.copy(filling.regions, buffer)
        elif filling.tensors:
            filling.pack(buffer)
        self._crossing.packed(results, buffer)
        self._packed[index] = buffer, format.sent_nbytes
        self.sent += 1
        self.packed_nbytes += format.sent_nbytes


class StreamIncoming:
    """The receiver's end.

    Attributes:
        is_plain: as of the sender's.
    """

    hands_over = False

    def __init__(self, way: Way, crossing: Crossing, catalogue: Catalogue) -> None:
        self._way = way
        self._crossing = crossing
        self._catalogue = catalogue
        self.is_plain = _is_plain(way)
        self._index = {m: index for index, group in enumerate(way.groups) for m in group}
        self.begin()

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()

    def end(self) -> None:
        """Lets go of what a step that failed has left."""
        self._arrived: dict[int, Result] = {}

    def carry(self, m: int) -> None:
        """Receives the message that microbatch ``m``'s result is in; the current stream is the way's."""
        index = self._index[m]
        group = self._way.groups[index]
        contents = self._catalogue.ask(index)
        format = contents.format
        message = Message(contents, self._crossing.receive(m, group, format.nbytes, format.sent_nbytes))
        for m, part in zip(group, contents.parts):
            self._arrived[m] = Result(message, part)

    def receive(self, m: int) -> Leaves:
        """The result of microbatch ``m``, to be called once."""
        return self._arrived[m].leaves()

    def release(self, m: int) -> None:
        """Microbatch ``m``'s result is needed no more."""
        result = self._arrived.pop(m, None)
        if result is not None:
            result.message.read()


def _is_plain(way: Way) -> bool:
    return way.wire is None and all(len(group) == 1 for group in way.groups)
