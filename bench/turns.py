"""Contenders take turns in one process, in another order each round, on the CPU or on a GPU."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch

Call = Callable[[], object]

TURN = 0.004  # seconds of a contender in a round on the CPU, about
CALLS = 5  # of a contender in a round on a GPU
HEAD_START = 1_000_000  # cycles of the GPU, about half a millisecond, in which the host launches what is timed


def on_cpu(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds of a call in each round."""
    repeats = {name: max(1, int(TURN / _cpu_seconds(call, 3))) for name, call in calls.items()}
    turns = {name: lambda n=name: _cpu_seconds(calls[n], repeats[n]) for name in calls}
    return take_turns(range(rounds), turns)


def on_gpu(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Name -> seconds on the current stream of a call in each round, with nothing in the caches.

    They are launched while the stream is busy: the host's time counts only where it is longer than half a
    millisecond. A turn is the median of CALLS calls.
    """
    for call in calls.values():
        call()  # compiles
    cache = torch.cuda.get_device_properties().L2_cache_size
    flushed = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")

    def seconds(call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START)
        flushed.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def turn(call: Call) -> float:
        return statistics.median(seconds(call) for _ in range(CALLS))

    return take_turns(range(rounds), {name: lambda c=call: turn(c) for name, call in calls.items()})


def captured(calls: dict[str, Call]) -> dict[str, Call]:
    """The same calls, each as the replay of a CUDA graph; they must have been made once before."""
    replays: dict[str, Call] = {}
    for name, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        replays[name] = graph.replay
    return replays


def one_step(step: Call, device: str) -> float:
    """Seconds of a step: on a GPU between two events on the current stream, with nothing in flight before."""
    if device == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def rounds_until(deadline: float, least: int, most: int) -> Iterator[int]:
    """Rounds for ``take_turns``: at least and at most so many, between that until time.monotonic() is past."""
    for i in range(most):
        if i >= least and time.monotonic() > deadline:
            return
        yield i


def take_turns(rounds: Iterable[int], turns: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Name -> what each turn returned, in the order of the rounds."""
    times: dict[str, list[float]] = {name: [] for name in turns}
    for i in rounds:
        for name in random.Random(i).sample(list(turns), len(turns)):
            times[name].append(turns[name]())
    return times


def _cpu_seconds(call: Call, repeats: int) -> float:
    call()  # what the one before left in the caches is not its fault
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
