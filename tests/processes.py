"""Real processes of a gloo group on loopback, each of which runs a function of a test.

They are forked from a server that has imported torch once, so that one starts in a moment. Unless a test says
how they join, the store is the test's own: it outlives any of the processes, as under torchrun.
"""

import functools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_FOREVER = 1e6  # seconds
TIMEOUT = 60.0  # seconds within which all processes of a test end, imports and all

# Torch asks for the name of each end of a connection to its store; where an answer is lost that takes 5 s.
os.environ.setdefault("RES_OPTIONS", "use-vc timeout:1 attempts:1")

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "pipeline_ext.checkpoint.files",
        "pipeline_ext.pipeline",
        "pipeline_ext.pipelining",
        "pipeline_ext.transformers",
        "pytest",
        "torch._dynamo",  # which the first optimizer imports
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp.sharded_grad_scaler",
        "torch.distributed.pipelining",
        "torch.distributed.tensor.parallel",
    ]
)

Join = Callable[[int, int], None]

_to_test: Connection | None = None  # in each of the processes


@dataclass(frozen=True)
class Failed:
    """A process whose function raised."""

    kind: type[BaseException]
    message: str
    traceback: str


@dataclass(frozen=True)
class Gone:
    """A process that ended, was stopped, hangs, or had to be killed, without a result."""

    why: str


def run(size: int, body: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """What ``body(*args)`` returns in each of ``size`` processes, by rank. Raises AssertionError if any fails.

    ``body`` is a function of a module; what it returns is pickled.
    """
    found = outcomes(size, body, *args, timeout=timeout)
    failed = {rank: outcome for rank, outcome in enumerate(found) if isinstance(outcome, Failed)}
    if failed:
        raise AssertionError(
            "\n".join(f"process {rank} raised:\n{outcome.traceback}" for rank, outcome in failed.items())
        )
    for rank, outcome in enumerate(found):
        assert not isinstance(outcome, Gone), f"process {rank} {outcome.why}"
    return found


def outcomes(
    size: int, body: Callable[..., Any], *args: Any, timeout: float = TIMEOUT, join: Join | None = None
) -> list[Any]:
    """As ``run``, with ``Failed`` or ``Gone`` for the processes that have no result.

    ``join(rank, size)`` is called in each, and makes the process group; it is pickled.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if join is None else None
    join = functools.partial(_join, store.port) if store is not None else join
    processes, connections = [], []
    try:
        for rank in range(size):
            here, there = _context.Pipe(duplex=False)
            connections.append(here)
            processes.append(
                _context.Process(target=_main, args=(there, rank, size, join, body, args), daemon=True)
            )
            processes[-1].start()
            there.close()
        return _gather(connections, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join(TIMEOUT)
        for connection in connections:
            connection.close()


def freeze() -> None:
    """Stops this process (SIGSTOP) for as long as the test lasts."""
    _end_without_result("was stopped")
    _signal_myself(signal.SIGSTOP)


def hang() -> None:
    """Keeps this thread for as long as the test lasts; of the main thread, the test waits for no result."""
    if threading.current_thread() is threading.main_thread():
        _end_without_result("hangs")
    time.sleep(_FOREVER)


def die() -> None:
    """Kills this process (SIGKILL)."""
    _signal_myself(signal.SIGKILL)


def _end_without_result(why: str) -> None:
    _to_test.send_bytes(pickle.dumps(Gone(why)))


def _signal_myself(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    time.sleep(TIMEOUT)  # a thread that is not the main one may go on for a moment


def _gather(connections: list[Connection], timeout: float) -> list[Any]:
    """Outcomes by rank, when every process has ended or is stopped, or the time is over."""
    found: dict[Connection, Any] = {}
    running = set(connections)
    deadline = time.monotonic() + timeout
    while running and (ready := wait(running, max(0, deadline - time.monotonic()))):
        for connection in ready:
            try:
                found[connection] = pickle.loads(connection.recv_bytes())
            except EOFError:
                found.setdefault(connection, Gone("ended"))
                running.discard(connection)
            if isinstance(found[connection], Gone):
                running.discard(connection)
    for connection in running:
        found[connection] = Gone(f"had not ended after {timeout:g} seconds")
    return [found[connection] for connection in connections]


def _join(port: int, rank: int, size: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)


def _main(to_test: Connection, rank: int, size: int, join: Join, body: Callable[..., Any], args: tuple) -> None:
    global _to_test
    _to_test = to_test
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        join(rank, size)
        outcome = body(*args)
    except BaseException as error:
        outcome = Failed(type(error), str(error), traceback.format_exc())
    to_test.send_bytes(pickle.dumps(outcome))
