"""Python threads that run one at a time: what takes the next turn is chosen, and every choice is tried.

Code that uses ``threading``, ``SimpleQueue`` or a store of torch.distributed gets those of this module instead,
and is otherwise as it is. Nothing goes on from a state that was seen before: the shared objects and, of each
thread, where it stands and its plain local variables.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple


class Violation(Exception):
    """A property does not hold."""


class _Over(BaseException):
    """Ends a thread of a world that nobody needs any more."""


class World:
    """Threads, of which one runs. ``shared``: objects whose attributes belong to the state."""

    def __init__(self) -> None:
        self.threads: list[Thread] = []
        self.shared: list[Any] = []
        self.error: BaseException | None = None
        self.is_over = False
        self._explorer = threading.Semaphore(0)

    def options(self) -> list[tuple["Thread", int]]:
        """What can happen next: a thread goes on, with an outcome of its choice."""
        able = [thread for thread in self.threads if not thread.has_ended and thread.gate()]
        able = next(([thread] for thread in able if thread.goes_first), able)
        return [(thread, outcome) for thread in able for outcome in range(thread.outcomes)]

    def go(self, thread: "Thread", outcome: int) -> None:
        thread.outcome = outcome
        thread.turn.release()
        self._explorer.acquire()
        if self.error is not None:
            raise self.error

    def stop_before(self, gate: Callable[[], bool], outcomes: int = 1, goes_first: bool = False) -> int:
        """Stops the running thread until it is chosen, which it is once ``gate()`` holds; returns the outcome.

        ``goes_first``: what it does next commutes with all that other threads can do before it, so that the
        other orders lead to the same states.
        """
        thread: Thread = _here.thread
        thread.gate, thread.outcomes, thread.goes_first = gate, outcomes, goes_first
        self._explorer.release()
        thread.turn.acquire()
        if self.is_over:
            raise _Over
        return thread.outcome

    def leave(self) -> None:
        """The running thread has ended."""
        self._explorer.release()

    def end(self) -> None:
        self.is_over = True
        for thread in self.threads:
            thread.turn.release()
        for thread in self.threads:
            thread.real.join()

    def state(self) -> Any:
        frames = sys._current_frames()
        places = []
        for thread in self.threads:
            place = []
            frame = None if thread.has_ended else frames.get(thread.real.ident)
            while frame is not None and frame.f_code is not Thread._run.__code__:
                if frame.f_code.co_filename != threading.__file__:
                    place.append((frame.f_code.co_name, frame.f_lasti, _plain(frame.f_locals)))
                frame = frame.f_back
            places.append((thread.name, thread.has_ended, tuple(place)))
        return tuple(places), _plain([vars(each) for each in self.shared])


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((key, _plain(each)) for key, each in value.items())
    if isinstance(value, list | tuple | deque):
        return tuple(map(_plain, value))
    if isinstance(value, int | float | str | bytes | None):
        return value
    if isinstance(value, BaseException):
        return repr(value)
    if isinstance(value, Event | Queue):
        return _plain(vars(value))
    return type(value).__name__


_here = threading.local()
world: World


class Thread:
    """As of ``threading``."""

    def __init__(self, target: Callable, args: tuple = (), name: str = "", daemon: bool = False) -> None:
        self._target, self._args, self.name = target, args, name
        self.gate: Callable[[], bool] = _always
        self.outcomes, self.outcome = 1, 0
        self.goes_first = True
        self.has_ended = False
        self.turn = threading.Semaphore(0)
        self.real = threading.Thread(target=self._run, daemon=True)

    def __str__(self) -> str:
        frame = sys._current_frames()[self.real.ident]
        while frame.f_code.co_filename in (__file__, threading.__file__):
            frame = frame.f_back
        return f"{self.name} in {frame.f_code.co_name}"

    def start(self) -> None:
        world.threads.append(self)
        self.real.start()

    def join(self, timeout: float | None = None) -> None:
        world.stop_before(lambda: self.has_ended, goes_first=True)

    def _run(self) -> None:
        _here.thread = self
        self.turn.acquire()
        if world.is_over:
            return
        try:
            self._target(*self._args)
        except _Over:
            return
        except BaseException as error:
            world.error = error
        self.has_ended = True
        world.leave()


def _always() -> bool:
    return True


class Event:
    """As of ``threading``. A wait with a limit never reaches it."""

    def __init__(self) -> None:
        self.value = False

    def is_set(self) -> bool:
        world.stop_before(_always)
        return self.value

    def set(self) -> None:
        world.stop_before(_always)
        self.value = True

    def clear(self) -> None:
        world.stop_before(_always)
        self.value = False

    def wait(self, timeout: float | None = None) -> bool:
        world.stop_before(lambda: self.value)
        return True


class Queue:
    """A ``SimpleQueue`` from one thread to one other."""

    def __init__(self) -> None:
        self.values: deque = deque()

    def __class_getitem__(cls, item: Any) -> type:
        return cls

    def put(self, value: Any) -> None:
        self.values.append(value)

    def get(self, timeout: float | None = None) -> Any:
        world.stop_before(lambda: bool(self.values), goes_first=True)
        return self.values.popleft()


class Store:
    """A store of torch.distributed, with one prefix."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def clone(self) -> "Store":
        return self

    def set(self, key: str, value: str | bytes) -> None:
        world.stop_before(_always)
        self.values[key] = value

    def get(self, key: str) -> Any:
        return self.values[key]

    def add(self, key: str, amount: int) -> int:
        world.stop_before(_always)
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def wait(self, keys: list[str], timeout: object) -> None:
        world.stop_before(lambda: self.check(keys))


THREADING = SimpleNamespace(
    Thread=Thread, Event=Event, TIMEOUT_MAX=threading.TIMEOUT_MAX, current_thread=lambda: _here.thread
)


def choose(outcomes: int) -> int:
    """Any number below ``outcomes``."""
    return world.stop_before(_always, outcomes)


class Explored(NamedTuple):
    states: int
    transitions: int
    ends: int


def explore(scene: Callable[[World], Callable[[], None]], most_states: int = 100_000) -> Explored:
    """Tries every choice. Raises Violation with the way to it.

    ``scene(world)`` makes the first threads, and returns what checks a state in which all threads have ended.
    """
    global world
    seen: set[int] = set()
    ends = transitions = 0
    ways: list[list[int]] = [[]]  # not followed yet, as indices of options
    while ways:
        way = ways.pop()
        world = World()
        check = scene(world)
        told = []
        try:
            for index in way:
                thread, outcome = world.options()[index]
                told.append(f"{thread.name}{f' chooses {outcome}' if thread.outcomes > 1 else ''}")
                world.go(thread, outcome)
            while True:
                transitions += bool(told)
                state = hash(world.state())
                if state in seen:
                    break
                seen.add(state)
                options = world.options()
                if not options:
                    waiting = [thread for thread in world.threads if not thread.has_ended]
                    if waiting:
                        raise Violation(f"nobody can go on: {', '.join(map(str, waiting))}")
                    check()
                    ends += 1
                    break
                ways += [[*way, index] for index in range(1, len(options))]
                thread, outcome = options[0]
                way = [*way, 0]
                told.append(thread.name)
                world.go(thread, outcome)
            if len(seen) > most_states:
                raise Violation(f"there are more than {most_states} states")
        except Exception as error:
            raise Violation(f"{error}\n" + "\n".join(told)) from error
        finally:
            world.end()
    return Explored(len(seen), transitions, ends)
