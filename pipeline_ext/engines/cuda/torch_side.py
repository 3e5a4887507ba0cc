"""The engine's calls to torch.cuda, all in one place."""

import contextlib
import functools
import gc
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# The number of a device's hardware queues; CUDA reads it when it starts. Streams that share a queue can hold
# each other up (head-of-line blocking).
_QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
_IS_LATE = _QUEUES not in os.environ and torch.cuda.is_initialized()
os.environ.setdefault(_QUEUES, "32")


_OF_CAPTURE = range(900, 909)  # cudaErrorStreamCaptureUnsupported to cudaErrorStreamCaptureWrongThread


@functools.cache
def warn_of_few_queues() -> None:
    """Warns, once, if CUDA started before this module could ask it for more queues."""
    if _IS_LATE:
        warnings.warn(
            "CUDA started before pipeline_ext was imported, with its usual 8 queues, in which the streams of "
            "ranks hold one another up; import pipeline_ext before the first use of CUDA, or start the program "
            f"with {_QUEUES}=32 in its environment",
            stacklevel=6,
        )


def num_devices() -> int:
    """CUDA devices that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def current_device() -> int:
    """The device number that "cuda" without a number means."""
    return torch.cuda.current_device()


def stream(handle: int, device: int) -> Any:
    """A torch stream for the handle of one of our streams."""
    return torch.cuda.ExternalStream(handle, device=device)


def callers(devices: Sequence[int]) -> list[int]:
    """The handles of the streams that are current on ``devices``."""
    return [torch._C._cuda_getCurrentRawStream(device) for device in devices]


def current_stream(device: torch.device) -> Any:
    """The stream that is current on ``device``."""
    return torch.cuda.current_stream(device)


@contextlib.contextmanager
def in_turn_on(stream: Any) -> Iterator[None]:
    """Inside it, ``stream`` is current, and begins after the current one, which waits for its end."""
    before = torch.cuda.current_stream(stream.device)
    stream.wait_stream(before)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


def use(stream: Any) -> None:
    """Makes a stream, and its device, current."""
    torch.cuda.set_stream(stream)


def generator(device: torch.device) -> torch.Generator:
    """The device's default generator."""
    return torch.cuda.default_generators[device.index]


def is_capturing(devices: Iterable[int]) -> bool:
    """Whether what the calling thread enqueues now on one of ``devices`` becomes a part of a graph."""
    for device in devices:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return True
    return False


def is_of_capture(error: BaseException | None) -> bool:
    """Whether torch raised ``error`` because CUDA refuses a call while a graph is captured."""
    return getattr(error, "error_code", None) in _OF_CAPTURE


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside it, the device is current."""
    return torch.cuda.device(device)


@contextlib.contextmanager
def restored(devices: Sequence[int]) -> Iterator[None]:
    """Restores, on exit, the current device, and the current streams of that device and of ``devices``."""
    device = torch.cuda.current_device()
    streams = [torch.cuda.current_stream(d) for d in dict.fromkeys([*devices, device])]
    try:
        yield
    finally:
        for stream in streams:
            torch.cuda.set_stream(stream)
        torch.cuda.set_device(device)


def move_module(module: nn.Module, device: torch.device) -> None:
    """Moves parameters and buffers in place: each parameter stays the object it is."""
    module.to(device)


def move(value: Any, device: torch.device) -> Any:
    """A pytree with its tensors on ``device``, which reads those ``on_host`` later."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if type(value) is tuple:
        return tuple(move(v, device) for v in value)
    if type(value) is dict:
        return {k: move(v, device) for k, v in value.items()}
    return pytree.tree_map_only(Tensor, lambda tensor: move(tensor, device), value)


def on_host(value: Any) -> bool:
    """Whether a pytree has tensors in the host's memory."""
    return any(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in pytree.tree_leaves(value))


def empty(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised memory, allocated on the current stream."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class GraphMemory:
    """A memory pool for graphs that never run at the same time, and the stream on which they are captured."""

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.device = device

    def release(self) -> None:
        """Gives the memory back when a capture has failed and all graphs are dropped.

        Torch counts the captures that use a pool, and does not count down for one that failed. Then the pool
        keeps even segments without a live block. A pool whose count is right must not be counted down again.
        """
        torch.cuda.empty_cache()
        if any(
            segment["segment_pool_id"] == self.handle and segment["active_size"] == 0
            for segment in torch.cuda.memory_snapshot()
        ):
            torch._C._cuda_releasePool(self.device.index, self.handle)
            torch.cuda.empty_cache()


class Graph:
    """One CUDA graph, captured and replayed."""

    def __init__(self, memory: GraphMemory) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._memory = memory

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Captures what runs inside it, on the stream of its memory, which is current there.

        A failed capture leaves torch as it was before: some versions end a capture only if it succeeds.
        """
        caller = torch.cuda.current_stream(self._memory.device)
        gc.collect()
        collects = gc.isenabled()
        gc.disable()  # it may free another graph, which must not happen during a capture
        try:
            # Other threads, such as a loader that pins memory, are not restricted.
            with torch.cuda.graph(
                self._graph,
                pool=self._memory.handle,
                stream=self._memory.stream,
                capture_error_mode="thread_local",
            ):
                yield
        except BaseException:
            _end_failed_capture(self._memory)
            raise
        finally:
            torch.cuda.set_stream(caller)
            if collects:
                gc.enable()

    def replay(self) -> None:
        """Runs it on the current stream, with fresh random numbers."""
        self._graph.replay()


def _end_failed_capture(memory: GraphMemory) -> None:
    with contextlib.suppress(RuntimeError):  # if the end of the capture has done it already
        torch._C._cuda_endAllocateToPool(memory.device.index, memory.handle)
    generator = torch.cuda.default_generators[memory.device.index]
    with contextlib.suppress(RuntimeError):
        # The state that the capture used would refuse to draw outside of a capture.
        generator.graphsafe_set_state(generator.graphsafe_get_state().clone_state())


def a_profiler_listens() -> bool:
    """Whether a tool that shows NVTX ranges is attached to this process."""
    return "NVTX_INJECTION64_PATH" in os.environ


def push_range(name: str) -> None:
    """Begins an NVTX range."""
    torch.cuda.nvtx.range_push(name)


def pop_range() -> None:
    """Ends it."""
    torch.cuda.nvtx.range_pop()
