"""The two ends of one way across a boundary between stages of different processes.

A message is a header and the packed results of a group. Its receiver expects what came last for that group, or
before it; where something else comes, a message of the expected size says so, and what is to come follows,
apart: first described, then itself. Both ends tell from the messages before what the other one knows. After a
failure a header alone says that nothing more comes: gloo can end no receive that waits.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import PeerError
from .description import decode, encode
from .message import Contents, Leaves, Message, Result, fill, nbytes_of
from .packet import Packet, Packets

_AS_KNOWN, _DESCRIBED, _NO_MORE = 1, 2, 3
_AHEAD = 2  # receives that wait at once: one is filled while the next is there for the sender to find


class Line(NamedTuple):
    """One way between this process and another, on which messages keep their order."""

    group: dist.ProcessGroup
    peer: int  # number of the other process in the group
    tag: int  # and the next: of what is described
    name: str  # of the other process, for people

    def send(self, tensor: Tensor, apart: bool = False) -> dist.Work:
        return self.group.send([tensor], self.peer, self.tag + apart)

    def receive(self, tensor: Tensor, apart: bool = False) -> dist.Work:
        return self.group.recv([tensor], self.peer, self.tag + apart)


class Way(NamedTuple):
    """What goes from one stage to another in each step."""

    where: str  # for people
    what: str  # "activations" or "gradients"
    receiver: int  # stage
    groups: Sequence[Sequence[int]]  # the microbatches of each message, in the order in which these leave
    wire: torch.dtype | None
    in_flight: int  # microbatches that the earlier stage may hold at once

    @property
    def room(self) -> int:
        """Messages whose results the earlier stage may hold at once, and one on its way."""
        return -(-self.in_flight // max(map(len, self.groups))) + 2

    def describe(self, index: int) -> str:
        """A message, for people."""
        group = ", ".join(map(str, self.groups[index]))
        plural = "es" if len(self.groups[index]) > 1 else ""
        return f"the {self.what} of microbatch{plural} {group} {self.where}"


class _Known:
    """What the receiver of a channel can expect."""

    def __init__(self) -> None:
        self._of_group: dict[int, Contents] = {}
        self._last: Contents | None = None

    def of(self, group: int, is_next: bool = True) -> Contents | None:
        """For a group; where it has not come yet, that of the message before, if that has come."""
        return self._of_group.get(group, self._last if is_next else None)

    def learn(self, group: int, contents: Contents) -> None:
        self._of_group[group] = self._last = contents


def _sent_nbytes(contents: Contents | None) -> int:
    """Of the message that is expected, without its header."""
    return 0 if contents is None else contents.format.sent_nbytes


def _nbytes(contents: Contents | None) -> int:
    """Of the room that it takes."""
    return 0 if contents is None else contents.format.nbytes


class Outgoing:
    """The sender's end. Attributes as of ``Channel``; ``seconds`` are spent on handing messages over."""

    hands_over = False

    def __init__(self, line: Line, way: Way) -> None:
        self._line = line
        self._way = way
        self._place = {m: (i, at) for i, group in enumerate(way.groups) for at, m in enumerate(group)}
        self._known = _Known()
        self._packets = Packets()
        self._pending: deque[tuple[list[dist.Work], Packet]] = deque()
        self.begin()

    def begin(self) -> None:
        """Prepares for a step."""
        self._waiting: dict[int, dict[int, Leaves]] = {}  # by message, then by place in it
        self.sent = 0
        self.packed_nbytes = 0
        self.seconds = 0.0
        self.result_nbytes = 0

    def end(self) -> None:
        """Lets go of what a step that failed has left."""
        self._waiting = {}

    def completes(self, m: int) -> bool:
        """Whether the step's last message leaves with microbatch ``m``."""
        index, _ = self._place[m]
        group = self._way.groups[index]
        return index == len(self._way.groups) - 1 and len(self._waiting.get(index, ())) == len(group) - 1

    def send(self, m: int, leaves: Leaves) -> None:
        """Takes the result of microbatch ``m``; if it completes its group, that leaves now.

        Raises PipelineError for what cannot be packed, PeerError where the other process is gone.
        """
        if m == 0:
            self.result_nbytes = nbytes_of(leaves)
        index, at = self._place[m]
        waiting = self._waiting.setdefault(index, {})
        waiting[at] = leaves
        if len(waiting) == len(self._way.groups[index]):
            del self._waiting[index]
            self._send_message(index, [waiting[at] for at in range(len(waiting))])

    def give_up(self) -> None:
        """Tells the receiver not to wait any longer."""
        packet = Packet(0)
        packet.write_header(_NO_MORE, 0)
        with contextlib.suppress(RuntimeError):  # it is gone
            self._pending.append(([self._line.send(packet.part(0))], packet))

    def flush(self, timeout: float) -> None:
        """Returns when the other process has all that was sent, or after ``timeout`` seconds."""
        while self._pending:
            works, packet = self._pending.popleft()
            try:
                for work in works:
                    work.wait(timedelta(seconds=timeout))
            except RuntimeError:  # it is gone, or does not come for it
                return
            self._packets.give_back(packet)

    def _send_message(self, index: int, results: list[Leaves]) -> None:
        expected = self._known.of(index)
        packet = self._take(_nbytes(expected))
        contents = expected
        if expected is None or not expected.pack(results, packet.body):
            contents, packet = self._fill(results, expected, packet)
        packet.write_header(_AS_KNOWN, index)
        part = packet.part(contents.format.sent_nbytes)
        begin = time.perf_counter()
        try:
            if contents is expected:
                works = [self._line.send(part)]
            else:
                described = encode(contents, self._way.wire)
                notice = Packet(_sent_nbytes(expected))
                notice.write_header(_DESCRIBED, index, len(described))
                works = [
                    self._line.send(notice.part(_sent_nbytes(expected))),
                    self._line.send(described, apart=True),
                    self._line.send(part, apart=True),
                ]
        except RuntimeError as error:
            raise PeerError(f"{self._line.name} cannot be sent {self._way.describe(index)}: {error}") from error
        self._known.learn(index, contents)
        self._pending.append((works, packet))
        self.sent += 1
        self.packed_nbytes += contents.format.sent_nbytes
        self.seconds += time.perf_counter() - begin

    def _fill(
        self, results: list[Leaves], expected: Contents | None, packet: Packet
    ) -> tuple[Contents, Packet]:
        """What the message holds, and the packet it is in: this one, if it has the room."""
        filling = fill(results, self._way.wire, None if expected is None else expected.format)
        contents = filling.contents
        if contents.format.nbytes > packet.nbytes:
            packet = Packet(contents.format.nbytes)
        if filling.tensors:
            filling.pack(packet.body)
        return expected if contents.equals(expected) else contents, packet

    def _take(self, nbytes: int) -> Packet:
        # Of so many messages the first has been received: its microbatches have left the earlier stage.
        while len(self._pending) >= self._way.room:
            works, packet = self._pending.popleft()
            for work in works:
                work.wait()
            self._packets.give_back(packet)
        return self._packets.take(nbytes)


class Incoming:
    """The receiver's end. A thread of its own waits for messages: no way holds up another, nor the stages.

    Attributes:
        buffers: packets that are there or in use.
    """

    hands_over = False

    def __init__(self, line: Line, way: Way, tasks: Sequence[int]) -> None:
        """``tasks``: of the other process, done when the messages are here."""
        self._line = line
        self._way = way
        self._tasks = tasks
        self._known = _Known()
        self._packets = Packets()
        self._change = threading.Condition()
        self.buffers = 0
        self._next = 0  # message that is waited for
        self._given_up = False
        self._steps: SimpleQueue[Receiver | None] = SimpleQueue()
        self.sent = self.packed_nbytes = self.result_nbytes = 0
        self.seconds = 0.0
        self._thread = threading.Thread(target=self._serve, name=f"pe from {line.peer}", daemon=True)
        self._thread.start()

    def begin(self, receiver: "Receiver") -> None:
        """Prepares for a step, in which ``receiver`` is told what has come."""
        self._arrived: dict[int, tuple[Result, Packet]] = {}
        self._next = 0
        self._steps.put(receiver)

    def end(self) -> None:
        """Lets go of what a step that failed has left."""
        self._arrived = {}

    def give_up(self) -> None:
        """Waits for nothing more, but what it waits for already."""
        with self._change:
            self._given_up = True
            self._change.notify()

    def close(self, timeout: float) -> None:
        """Ends the thread, or leaves it after so many seconds to wait for a process that does not send."""
        self._steps.put(None)
        self._thread.join(timeout)

    def waiting(self) -> str:
        """What it waits for, as a line for people; empty where all has come."""
        if self._next == len(self._way.groups):
            return ""
        return f"{self._way.describe(self._next)} from {self._line.name}"

    def receive(self, m: int) -> Leaves:
        """The result of microbatch ``m``, to be called once."""
        result, _ = self._arrived[m]
        return result.leaves()

    def release(self, m: int) -> None:
        """Microbatch ``m``'s result is needed no more."""
        result, packet = self._arrived.pop(m, (None, None))
        if result is not None and result.message.read():
            with self._change:
                self._packets.give_back(packet)
                self.buffers -= 1
                self._change.notify()

    def _serve(self) -> None:
        for receiver in iter(self._steps.get, None):
            try:
                self._receive_step(receiver)
            except _NoMore:
                return
            except Exception as error:
                self._lost(receiver, error)
                return

    def _lost(self, receiver: "Receiver", error: Exception) -> None:
        failure = PeerError(f"{self._line.name} is lost ({error}); waited for {self.waiting()}")
        failure.__cause__ = error
        receiver.fail(failure)

    def _receive_step(self, receiver: "Receiver") -> None:
        posted: deque[tuple[dist.Work, Packet, Contents | None]] = deque()
        groups = self._way.groups
        for index, group in enumerate(groups):
            self._next = index
            while index + len(posted) < len(groups) and len(posted) < _AHEAD:
                ahead = index + len(posted)
                expected = self._known.of(ahead, is_next=ahead == index)
                if posted and expected is None:
                    break
                packet = self._take(_nbytes(expected), wait=not posted)
                if packet is None:
                    break
                posted.append((self._line.receive(packet.part(_sent_nbytes(expected))), packet, expected))
            work, packet, expected = posted.popleft()
            work.wait()
            contents, packet = self._open(index, packet, expected)
            message = Message(contents, packet.body)
            for m, part in zip(group, contents.parts):
                self._arrived[m] = Result(message, part), packet
            del message, packet, work
            receiver.deliver(self._tasks[index], self._way.receiver, group)
        self._next = len(groups)

    def _open(self, index: int, packet: Packet, expected: Contents | None) -> tuple[Contents, Packet]:
        """What the message that has come holds, and the packet it is in."""
        kind, came, nbytes = packet.read_header()
        if kind == _NO_MORE:
            raise _NoMore
        if came != index:
            raise PeerError(f"message {came} came in place of {index}: the processes' plans differ")
        contents = expected
        if kind == _DESCRIBED:
            described = torch.empty(nbytes, dtype=torch.uint8)
            self._line.receive(described, apart=True).wait()
            contents = decode(described)
            packet = self._packets.take(_nbytes(contents))
            self._line.receive(packet.part(_sent_nbytes(contents)), apart=True).wait()
        self._known.learn(index, contents)
        return contents, packet

    def _take(self, nbytes: int, wait: bool) -> Packet | None:
        """A packet; None where there is no room and it should not wait for some."""
        with self._change:
            while self.buffers >= self._way.room and not self._given_up:
                if not wait:
                    return None
                self._change.wait()
            if self._given_up:
                raise _NoMore
            self.buffers += 1
            return self._packets.take(nbytes)


class _NoMore(Exception):
    """Nothing more comes, or is waited for."""


class Receiver(NamedTuple):
    """Whom an incoming channel tells of what has come."""

    deliver: Callable[[int, int, Sequence[int]], object]  # what a task sent a stage of these microbatches
    fail: Callable[[Exception], object]
