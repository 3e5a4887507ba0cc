"""The engine's calls to torch.cuda, all in one place."""

import contextlib
import gc
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# The number of a device's hardware queues; CUDA reads it when it starts. Streams that share a queue can hold
# each other up (head-of-line blocking).
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


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


def use(stream: Any) -> None:
    """Makes a stream, and its device, current."""
    torch.cuda.set_stream(stream)


def generator(device: torch.device) -> torch.Generator:
    """The device's default generator."""
    return torch.cuda.default_generators[device.index]


def is_capturing() -> bool:
    """Whether what the calling thread enqueues now becomes a part of a graph."""
    return torch.cuda.is_current_stream_capturing()


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
    """A pytree with its tensors on ``device``; the host does not wait for pinned ones."""
    if isinstance(value, Tensor):
        return value if value.device == device else value.to(device, non_blocking=True)
    if type(value) is tuple:
        return tuple(move(v, device) for v in value)
    if type(value) is dict:
        return {k: move(v, device) for k, v in value.items()}
    return pytree.tree_map_only(Tensor, lambda tensor: move(tensor, device), value)


def empty(nbytes: int, device: torch.device) -> Tensor:
    """Uninitialised memory, allocated on the current stream."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class GraphMemory:
    """A memory pool for graphs that never run at the same time."""

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()


class Graph:
    """One CUDA graph, captured and replayed."""

    def __init__(self, memory: GraphMemory) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._memory = memory

    @contextlib.contextmanager
    def capture(self, device: torch.device) -> Iterator[None]:
        """Captures what runs inside it, on a stream of its own, which is current there.

        A failed capture leaves torch as it was before: some versions end a capture only if it succeeds.
        """
        caller = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        gc.collect()
        collects = gc.isenabled()
        gc.disable()  # it may free another graph, which must not happen during a capture
        try:
            # Other threads, such as a loader that pins memory, are not restricted.
            with torch.cuda.graph(
                self._graph,
                pool=self._memory.handle,
                stream=stream,
                capture_error_mode="thread_local",
            ):
                yield
        except BaseException:
            _end_failed_capture(device, self._memory)
            raise
        finally:
            torch.cuda.set_stream(caller)
            if collects:
                gc.enable()

    def replay(self) -> None:
        """Runs it on the current stream, with fresh random numbers."""
        self._graph.replay()


def _end_failed_capture(device: torch.device, memory: GraphMemory) -> None:
    with contextlib.suppress(RuntimeError):  # if the end of the capture has done it already
        torch._C._cuda_endAllocateToPool(device.index, memory.handle)
    generator = torch.cuda.default_generators[device.index]
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
