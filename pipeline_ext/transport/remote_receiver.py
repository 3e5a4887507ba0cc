"""The receiver of results from a stage of another process, through the host's memory."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..errors import PeerError
from ..processes.connections import PATIENCE
from ..processes.peer import Peer
from .description import Description, Leaves
from .encoding import decode
from .flow import Flow
from .message import Message, Result
from .packet import Packet, Packets
from .remote_protocol import DESCRIBED, NO_MORE, Known, buffer_nbytes, sent_nbytes

_POSTED = 2  # receives at once: one is filled while the next is there for the sender to find


class Listener(NamedTuple):
    """Callbacks of a receiver's thread."""

    deliver: Callable[[int, int, Sequence[int]], object]  # what a task sent a stage of these microbatches
    decide: Callable[[int], object]  # the task that another process has taken
    fail: Callable[[Exception], object]


class RemoteReceiver:
    """Waits for messages in a thread of its own, so that no channel blocks another (head-of-line), nor a stage.

    Attributes:
        buffers: packets that are posted or in use.
    """

    hands_over = False
    packs = True

    def __init__(self, peer: Peer, flow: Flow, tasks: Sequence[int]) -> None:
        """``tasks``: by message, the task of the other process that is done once the message is here."""
        self._peer = peer
        self._flow = flow
        self._tasks = tasks
        self._known = Known()
        self._packets = Packets()
        self._change = threading.Condition()
        self.buffers = 0
        self._given_up = False
        self._listeners: SimpleQueue[Listener | None] = SimpleQueue()  # one for each step
        self.begin()
        self._thread = threading.Thread(target=self._serve, name=f"pe from {peer.rank}", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()
        self._next = 0  # message that is waited for

    def listen(self, listener: Listener) -> None:
        """Receives the messages of a step, and calls ``listener``."""
        self._listeners.put(listener)

    def end(self) -> None:
        """Frees what a failed step has left."""
        self._arrived: dict[int, tuple[Result, Packet]] = {}

    def give_up(self) -> None:
        """Posts no more receives; those that are posted go on waiting."""
        with self._change:
            self._given_up = True
            self._change.notify()

    def close(self, timeout: float) -> None:
        """Ends the thread; after ``timeout`` seconds leaves it waiting for a process that does not send."""
        self._listeners.put(None)
        self._thread.join(timeout)

    def waiting(self) -> str:
        """What it waits for, for error messages; empty if everything has arrived."""
        if self._next == len(self._flow.groups):
            return ""
        return f"{self._flow.describe(self._next)} from {self._peer.name}"

    def receive(self, m: int) -> Leaves:
        """The result of microbatch ``m``, to be called once."""
        result, _ = self._arrived[m]
        return result.leaves()

    def release(self, m: int) -> None:
        """Frees what was received for microbatch ``m``."""
        if m not in self._arrived:
            return
        result, packet = self._arrived.pop(m)
        if result.message.release():
            with self._change:
                self._packets.give_back(packet)
                self.buffers -= 1
                self._change.notify()

    def _serve(self) -> None:
        for listener in iter(self._listeners.get, None):
            try:
                self._receive_step(listener)
            except _NoMore:
                return
            except Exception as error:
                self._lost(listener, error)
                return

    def _lost(self, listener: Listener, error: Exception) -> None:
        failure = PeerError(f"{self._peer.name} is lost ({error}); waited for {self.waiting()}")
        failure.__cause__ = error
        listener.fail(failure)

    def _receive_step(self, listener: Listener) -> None:
        posted: deque[tuple[dist.Work, Packet, Description | None]] = deque()
        groups = self._flow.groups
        for index, group in enumerate(groups):
            self._next = index
            while index + len(posted) < len(groups) and len(posted) < _POSTED:
                ahead = index + len(posted)
                expected = self._known.of(ahead, is_next=ahead == index)
                if posted and expected is None:
                    break
                packet = self._take(buffer_nbytes(expected), wait=not posted)
                if packet is None:
                    break
                posted.append((self._peer.recv(packet.part(sent_nbytes(expected))), packet, expected))
            work, packet, expected = posted.popleft()
            work.wait(PATIENCE)
            description, packet = self._open(index, packet, expected)
            message = Message(description, packet.body)
            for m, part in zip(group, description.parts):
                self._arrived[m] = Result(message, part), packet
            del message, packet, work
            listener.deliver(self._tasks[index], self._flow.receiver, group)
        self._next = len(groups)

    def _open(self, index: int, packet: Packet, expected: Description | None) -> tuple[Description, Packet]:
        """The description of the message that arrived, and the packet that holds it."""
        kind, arrived, nbytes = packet.read_header()
        if kind == NO_MORE:
            raise _NoMore
        if arrived != index:
            raise PeerError(f"message {arrived} came in place of {index}: the processes' plans differ")
        if kind == DESCRIBED:
            described = torch.empty(nbytes, dtype=torch.uint8)
            self._peer.recv(described, second_tag=True).wait(PATIENCE)
            description = decode(described)
            packet = self._packets.take(description.format.nbytes)
            self._peer.recv(packet.part(description.format.sent_nbytes), second_tag=True).wait(PATIENCE)
        else:
            assert expected is not None  # or the sender would have described it
            description = expected
        self._known.learn(index, description)
        return description, packet

    def _take(self, nbytes: int, wait: bool) -> Packet | None:
        """A packet; None if there is no room and ``wait`` is False."""
        with self._change:
            while self.buffers >= self._flow.room and not self._given_up:
                if not wait:
                    return None
                self._change.wait()
            if self._given_up:
                raise _NoMore
            self.buffers += 1
            return self._packets.take(nbytes)


class _NoMore(Exception):
    """Nothing more is sent, or waited for."""
