"""One order for the processes that hold the same stages: one of them, the leader, tells the others the next.

``csrc/schedule/decided_order.hpp`` says why nobody waits forever. A message is one int64. The first of a step
names the step and the plan; then comes one for each task of the rank, before the leader runs it. After a
failure one says that nothing more is sent, because gloo cannot end a receive that waits.
"""

import contextlib
import functools
import threading
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist

from .. import _C
from ..errors import PeerError
from ..processes.connections import PATIENCE
from ..processes.peer import Peer
from .remote_receiver import Listener

Body = Callable[[int], None]
Bodies = Mapping[tuple[int, str], Body]  # by stage and kind

_NO_MORE = -1
_POSTED = 4  # receives at once: gloo sends at once what a receive waits for, and asks first otherwise


class DecisionSender:
    """The leader's side: tells the others of each task of this rank."""

    def __init__(self, peers: Sequence[Peer], plan: _C.Plan, rank: int) -> None:
        self._peers = peers
        self._plan = _Named(plan)
        self._tasks: dict[tuple[int, str], dict[int, int]] = {}  # by stage and kind, and microbatch
        for task, (stage, kind, m) in _tasks_of(plan, rank).items():
            self._tasks.setdefault((stage, kind), {})[m] = task
        size = 1 + sum(map(len, self._tasks.values()))
        self._messages = [torch.empty(1, dtype=torch.int64) for _ in range(size)]  # of a step
        self._works: list[list[dist.Work]] = [[] for _ in range(size)]  # by message
        self._next = 0  # message

    def telling(self, bodies: Bodies) -> Bodies:
        """``bodies`` that tell the others first; one for each task, because the others wait for all."""
        return {key: functools.partial(self._run, tasks, bodies.get(key)) for key, tasks in self._tasks.items()}

    def give_up(self) -> None:
        """Tells the others not to wait any longer."""
        message = torch.tensor([_NO_MORE])
        self._messages.append(message)  # kept until it is sent
        self._works.append([])
        for peer in self._peers:
            with contextlib.suppress(RuntimeError):  # it is gone
                self._works[-1].append(peer.send(message))

    def flush(self, timeout: float) -> None:
        """Returns when the others have everything that was sent, or after ``timeout`` seconds."""
        for works in self._works:
            try:
                for work in works:
                    work.wait(timedelta(seconds=timeout))
            except RuntimeError:  # it is gone, or does not receive in time
                return
            works.clear()

    def _run(self, tasks: Mapping[int, int], body: Body | None, m: int) -> None:
        if self._next == 0:
            self._send(self._plan.next_step())
        self._send(tasks[m])
        if body is not None:
            body(m)

    def _send(self, value: int) -> None:
        message, works = self._messages[self._next], self._works[self._next]
        for work in works:  # those of the step before, which have ended long ago
            work.wait(PATIENCE)
        works.clear()
        message.fill_(value)
        for peer in self._peers:
            try:
                works.append(peer.send(message))
            except RuntimeError as error:
                raise PeerError(f"{peer.name} cannot be told which task is next: {error}") from error
        self._next = (self._next + 1) % len(self._messages)


class DecisionReceiver:
    """A follower's side: hears of each task of this rank, in a thread of its own."""

    def __init__(self, peer: Peer, plan: _C.Plan, rank: int) -> None:
        self._peer = peer
        self._plan = _Named(plan)
        self._count = len(_tasks_of(plan, rank))
        self._heard = self._count  # tasks of this step
        self._listeners: SimpleQueue[Listener | None] = SimpleQueue()  # one for each step
        self._thread = threading.Thread(target=self._serve, name="pe decisions", daemon=True)
        self._thread.start()

    def listen(self, listener: Listener) -> None:
        """Receives the decisions of a step, and calls ``listener``."""
        self._heard = 0
        self._listeners.put(listener)

    def give_up(self) -> None:
        """The leader ends a receive that waits."""

    def close(self, timeout: float) -> None:
        """Ends the thread; after ``timeout`` seconds leaves it waiting for a process that does not send."""
        self._listeners.put(None)
        self._thread.join(timeout)

    def waiting(self) -> str:
        """What it waits for, for error messages; empty if everything has arrived."""
        return "" if self._heard == self._count else f"the next task from {self._peer.name}"

    def _serve(self) -> None:
        for listener in iter(self._listeners.get, None):
            try:
                if not self._receive_step(listener):
                    return
            except Exception as error:
                failure = PeerError(f"{self._peer.name} is lost ({error}); waited for {self.waiting()}")
                failure.__cause__ = error
                listener.fail(failure)
                return

    def _receive_step(self, listener: Listener) -> bool:
        """Whether another step may follow."""
        posted: deque[tuple[dist.Work, torch.Tensor]] = deque()
        for index in range(1 + self._count):
            while len(posted) < min(_POSTED, 1 + self._count - index):
                message = torch.empty(1, dtype=torch.int64)
                posted.append((self._peer.recv(message), message))
            work, message = posted.popleft()
            work.wait(PATIENCE)
            value = int(message)
            if value == _NO_MORE:
                return False
            if index == 0:
                self._plan.check(value, self._peer.name)
                continue
            self._heard = index
            listener.decide(value)
        return True


class _Named:
    """A plan and the number of its steps, as one number, by which processes notice that they run others."""

    def __init__(self, plan: _C.Plan) -> None:
        self._text = zlib.crc32(plan.to_csv().encode())
        self._steps = 0

    def next_step(self) -> int:
        self._steps = (self._steps + 1) % (1 << 31)
        return self._steps << 32 | self._text

    def check(self, found: int, whom: str) -> None:
        """Raises PeerError unless ``found`` is the next step's."""
        expected = self.next_step()
        if found == expected:
            return
        what = "another plan" if (found ^ expected) & 0xFFFFFFFF else f"step {found >> 32} of its plan"
        raise PeerError(
            f"{whom} runs {what}, and this process step {expected >> 32}: processes that hold the same stages "
            "call step and eval in the same order, with as many microbatches"
        )


def _tasks_of(plan: _C.Plan, rank: int) -> dict[int, tuple[int, str, int]]:
    """Stage, kind and microbatch of each task of a rank."""
    described = {task: plan.describe(task) for task in range(len(plan))}
    return {task: (stage, kind, m) for task, (kind, stage, m, of, _) in described.items() if of == rank}
