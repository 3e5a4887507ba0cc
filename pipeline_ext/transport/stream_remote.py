"""Sender and receiver of results that cross a boundary between processes on device streams.

All processes enqueue their tasks in one order. A receive is enqueued where that order has the send, and its
size must be known then. So in the first step of a kind the sender's host tells the receiver's host what each
message holds; the messages of later steps of that kind are the same.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .description import Description, Leaves
from .flow import Flow
from .format import AsIs
from .grouping import Grouping
from .message import Message, Result, nbytes_of, prepare


class StreamConnection(Protocol):
    """Sends and receives messages on the current stream, and manages their memory in this process."""

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """A buffer for a message to be packed into, on the current stream."""

    def packed(self, results: dict[int, Any], buffer: Tensor) -> None:
        """Keeps these results, by microbatch, alive: they were packed into ``buffer`` just now."""

    def send(self, m: int, results: Sequence[int], buffer: Tensor, nbytes: int) -> None:
        """Sends the first ``nbytes``, the results of these microbatches, at ``m``'s turn."""

    def receive(self, m: int, results: Sequence[int], nbytes: int, sent_nbytes: int) -> Tensor:
        """A buffer of ``nbytes`` on this process's device; ``send`` fills its first ``sent_nbytes``."""


class KnownMessages(Protocol):
    """What the messages between two stages hold, in steps of the kind that runs."""

    def known(self, index: int) -> Description | None:
        """Of the message with this number, if the receiver was told."""

    def tell(self, index: int, description: Description) -> None:
        """Tells the receiver. Raises PipelineError if it already expects something else."""

    def ask(self, index: int) -> Description:
        """What the sender told. Raises PeerError if it did not."""


class StreamSender:
    """Attributes as of ``Channel``; nobody here knows how long messages take.

    Attributes:
        packs: whether a packer writes the messages; one result alone in its own type is copied.
    """

    hands_over = False
    seconds = 0.0

    def __init__(
        self, flow: Flow, connection: StreamConnection, known: KnownMessages, device: torch.device
    ) -> None:
        self._wire = flow.wire
        self._connection = connection
        self._known = known
        self._device = device
        self.packs = _packs(flow)
        self._grouping = Grouping(flow.groups)
        self.begin()

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()
        self.sent = 0
        self.packed_nbytes = 0
        self.result_nbytes = 0

    def end(self) -> None:
        """Frees what a failed step has left."""
        self._grouping.clear()
        self._packed: dict[int, tuple[Tensor, int]] = {}  # by message: buffer, and bytes to send

    def completes(self, m: int) -> bool:
        """Whether microbatch ``m``'s result completes the step's last message."""
        return self._grouping.completes(m)

    def send(self, m: int, leaves: Leaves) -> None:
        """Takes the result of microbatch ``m``; if that completes its group, packs the message.

        Raises PipelineError for what cannot be packed, or has a shape that the receiver does not expect.
        """
        if m == 0:
            self.result_nbytes = nbytes_of(leaves)
        results = self._grouping.add(m, leaves)
        if results is not None:
            self._pack(self._grouping.index(m), results)

    def transfer(self, m: int) -> None:
        """Sends the message that holds microbatch ``m``'s result on the current stream."""
        index = self._grouping.index(m)
        self._connection.send(m, self._grouping.groups[index], *self._packed.pop(index))

    def _pack(self, index: int, results: list[Leaves]) -> None:
        known = self._known.known(index)
        prepared = prepare(results, self._wire, None if known is None else known.format)
        if not prepared.description.equals(known):
            self._known.tell(index, prepared.description)
        format = prepared.description.format
        buffer = self._connection.take(format.nbytes, self._device)
        if not self.packs:
            assert isinstance(format, AsIs)  # there is no wire type
            format.copy(prepared.regions, buffer)
        elif prepared.tensors:
            prepared.pack(buffer)
        self._connection.packed(dict(zip(self._grouping.groups[index], results)), buffer)
        self._packed[index] = buffer, format.sent_nbytes
        self.sent += 1
        self.packed_nbytes += format.sent_nbytes


class StreamReceiver:
    """Attributes as of the sender."""

    hands_over = False

    def __init__(self, flow: Flow, connection: StreamConnection, known: KnownMessages) -> None:
        self._connection = connection
        self._known = known
        self.packs = _packs(flow)
        self._grouping = Grouping(flow.groups)
        self.begin()

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()

    def end(self) -> None:
        """Frees what a failed step has left."""
        self._arrived: dict[int, Result] = {}

    def transfer(self, m: int) -> None:
        """Receives the message that holds microbatch ``m``'s result on the current stream."""
        index = self._grouping.index(m)
        group = self._grouping.groups[index]
        description = self._known.ask(index)
        format = description.format
        buffer = self._connection.receive(m, group, format.nbytes, format.sent_nbytes)
        message = Message(description, buffer)
        for m, part in zip(group, description.parts):
            self._arrived[m] = Result(message, part)

    def receive(self, m: int) -> Leaves:
        """The result of microbatch ``m``, to be called once."""
        return self._arrived[m].leaves()

    def release(self, m: int) -> None:
        """Frees what was received for microbatch ``m``."""
        result = self._arrived.pop(m, None)
        if result is not None:
            result.message.release()


def _packs(flow: Flow) -> bool:
    return flow.wire is not None or any(len(group) > 1 for group in flow.groups)
