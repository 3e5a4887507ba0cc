"""The sender of results to a stage of another process, through the host's memory."""

import contextlib
import time
from collections import deque
from datetime import timedelta

import torch.distributed as dist

from ..errors import PeerError
from ..processes.connections import PATIENCE
from ..processes.peer import Peer
from .description import Description, Leaves
from .encoding import encode
from .flow import Flow
from .grouping import Grouping
from .message import nbytes_of, prepare
from .packet import Packet, Packets
from .remote_protocol import AS_KNOWN, DESCRIBED, NO_MORE, Known, buffer_nbytes, sent_nbytes


class RemoteSender:
    """Attributes as of ``Channel``; ``seconds`` is the time spent on handing messages to gloo."""

    hands_over = False
    packs = True

    def __init__(self, peer: Peer, flow: Flow) -> None:
        self._peer = peer
        self._flow = flow
        self._grouping = Grouping(flow.groups)
        self._known = Known()
        self._packets = Packets()
        self._pending: deque[tuple[list[dist.Work], Packet]] = deque()
        self.begin()

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()
        self.sent = 0
        self.packed_nbytes = 0
        self.seconds = 0.0
        self.result_nbytes = 0

    def end(self) -> None:
        """Frees what a failed step has left."""
        self._grouping.clear()

    def completes(self, m: int) -> bool:
        """Whether microbatch ``m``'s result completes the step's last message."""
        return self._grouping.completes(m)

    def send(self, m: int, leaves: Leaves) -> None:
        """Takes the result of microbatch ``m``; if that completes its group, sends the message.

        Raises PipelineError for what cannot be packed, PeerError if the other process is gone.
        """
        if m == 0:
            self.result_nbytes = nbytes_of(leaves)
        results = self._grouping.add(m, leaves)
        if results is not None:
            self._send_message(self._grouping.index(m), results)

    def give_up(self) -> None:
        """Tells the receiver not to wait any longer."""
        packet = Packet(0)
        packet.write_header(NO_MORE, 0)
        with contextlib.suppress(RuntimeError):  # it is gone
            self._pending.append(([self._peer.send(packet.part(0))], packet))

    def flush(self, timeout: float) -> None:
        """Returns when the other process has everything that was sent, or after ``timeout`` seconds."""
        while self._pending:
            works, packet = self._pending.popleft()
            try:
                for work in works:
                    work.wait(timedelta(seconds=timeout))
            except RuntimeError:  # it is gone, or does not receive in time
                return
            self._packets.give_back(packet)

    def _send_message(self, index: int, results: list[Leaves]) -> None:
        expected = self._known.of(index)
        packet = self._take(buffer_nbytes(expected))
        if expected is not None and expected.pack(results, packet.body):
            description = expected
        else:
            description, packet = self._prepare(results, expected, packet)
        packet.write_header(AS_KNOWN, index)
        part = packet.part(description.format.sent_nbytes)
        begin = time.perf_counter()
        try:
            if description is expected:
                works = [self._peer.send(part)]
            else:
                described = encode(description, self._flow.wire)
                notice = Packet(sent_nbytes(expected))
                notice.write_header(DESCRIBED, index, len(described))
                works = [
                    self._peer.send(notice.part(sent_nbytes(expected))),
                    self._peer.send(described, second_tag=True),
                    self._peer.send(part, second_tag=True),
                ]
        except RuntimeError as error:
            raise PeerError(
                f"{self._peer.name} cannot be sent {self._flow.describe(index)}: {error}"
            ) from error
        self._known.learn(index, description)
        self._pending.append((works, packet))
        self.sent += 1
        self.packed_nbytes += description.format.sent_nbytes
        self.seconds += time.perf_counter() - begin

    def _prepare(
        self, results: list[Leaves], expected: Description | None, packet: Packet
    ) -> tuple[Description, Packet]:
        """Packs results that do not match ``expected``'s template: into ``packet``, or a larger one."""
        prepared = prepare(results, self._flow.wire, None if expected is None else expected.format)
        description = prepared.description
        if description.format.nbytes > packet.nbytes:
            packet = Packet(description.format.nbytes)
        if prepared.tensors:
            prepared.pack(packet.body)
        return expected if expected is not None and description.equals(expected) else description, packet

    def _take(self, nbytes: int) -> Packet:
        # The oldest of so many messages was received: its microbatches have left the earlier stage.
        while len(self._pending) >= self._flow.room:
            works, packet = self._pending.popleft()
            for work in works:
                work.wait(PATIENCE)
            self._packets.give_back(packet)
        return self._packets.take(nbytes)
