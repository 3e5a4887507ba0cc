"""Contenders take turns, each in processes of its own, so that a slow minute of the machine hits all alike."""

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

Run = Callable[[int], list]
"""Runs so many steps; returns one entry for each of them."""

A_MOMENT = 2.0
"""Seconds to wait for a quiet machine before benchmarks of GPUs, whose time there is lent."""

Span = tuple[float, float, Any]
"""When a process began a step and ended it, in seconds of the machine's clock, and what it measured besides."""


class Contender:
    """``make(*args, rank)``, on each of ``ranks`` processes, returns what runs the steps there."""

    def __init__(self, name: str, make: Callable[..., Run], *args: Any, ranks: int = 1) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connections, self._processes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, make, *args, rank), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def wait_until_ready(self) -> None:
        for connection in self._connections:
            connection.recv()

    def run(self, steps: int) -> list[list]:
        """What each process measured, step by step."""
        for connection in self._connections:
            connection.send(steps)
        return [connection.recv() for connection in self._connections]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(timeout=20)
            process.kill()


class Turns(NamedTuple):
    """What contenders did, by contender: a figure for each round."""

    quiet: bool  # whether the machine was, before the first
    seconds: dict[Any, list[float]]  # median of a round's steps, each from its first begin to its last end
    figures: dict[Any, list[float]]  # the same of what was made of the steps


def in_turn(
    contenders: Mapping[Hashable, Contender],
    rounds: int,
    steps: int,
    figure: Callable[[Any, Sequence[Span], float], float | None] = lambda *_: None,
) -> Turns:
    """Each contender runs ``steps`` steps in each round.

    ``figure`` is given the contender's key, a step's spans by process, and the step's seconds.
    """
    seconds: dict[Hashable, list[float]] = {key: [] for key in contenders}
    figures: dict[Hashable, list[float]] = {key: [] for key in contenders}
    with running(list(contenders.values())):
        quiet = wait_until_quiet()
        for _ in range(rounds):
            for key, contender in contenders.items():
                spans = list(zip(*contender.run(steps)))
                lasted = [max(s[1] for s in ranks) - min(s[0] for s in ranks) for ranks in spans]
                seconds[key].append(statistics.median(lasted))
                found = [figure(key, ranks, took) for ranks, took in zip(spans, lasted)]
                if None not in found:
                    figures[key].append(statistics.median(found))
    return Turns(quiet, seconds, figures)


@contextlib.contextmanager
def running(contenders: Sequence[Contender]) -> Iterator[None]:
    """Waits until all are ready; ends them afterwards."""
    try:
        for contender in contenders:
            contender.wait_until_ready()
        yield
    finally:
        for contender in contenders:
            contender.close()


def _serve(connection: Connection, make: Callable[..., Run], *args: Any) -> None:
    run = make(*args)
    connection.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            connection.send(run(connection.recv()))


def wait_until_quiet(seconds: float = 120.0) -> bool:
    """Waits until nothing else takes more than a tenth of the machine; False if it never was."""

    def busy_and_all() -> tuple[int, int]:
        with open("/proc/stat") as stat:
            ticks = [int(word) for word in stat.readline().split()[1:9]]
        return sum(ticks) - ticks[3] - ticks[4], sum(ticks)

    deadline = time.monotonic() + seconds
    if not os.path.exists("/proc/stat"):
        return False
    before = busy_and_all()
    while time.monotonic() < deadline:
        time.sleep(0.7)
        after = busy_and_all()
        if after[0] - before[0] < 0.1 * (after[1] - before[1]):
            return True
        before = after
    return False


def one_thread_a_process() -> None:
    """For the processes started from now on."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
