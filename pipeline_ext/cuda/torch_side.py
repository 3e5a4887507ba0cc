"""What the engine asks of torch.cuda, and nothing else of the package does."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def num_devices() -> int:
    """CUDA devices that torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def current_device() -> int:
    """The ordinal that a "cuda" without one means."""
    return torch.cuda.current_device()


def stream(handle: int, device: int) -> Any:
    """A stream of ours, as torch takes it."""
    return torch.cuda.ExternalStream(handle, device=device)


def callers(devices: Sequence[int]) -> list[int]:
    """The handles of the streams that are current on ``devices``."""
    return [torch.cuda.current_stream(device).cuda_stream for device in devices]


def use(stream: Any) -> None:
    """Makes a stream, and its device, current."""
    torch.cuda.set_stream(stream)


@contextlib.contextmanager
def restored(devices: Sequence[int]) -> Iterator[None]:
    """Afterwards the current device, and its and their current streams, are those from before."""
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
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def empty(nbytes: int, device: torch.device) -> Tensor:
    """Memory that belongs to the current stream."""
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class Graph:
    """One CUDA graph of what a context captures."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    @contextlib.contextmanager
    def capture(self, device: torch.device) -> Iterator[None]:
        """Captures, on a stream of its own, which is current meanwhile."""
        stream = torch.cuda.Stream(device)
        # Other threads, a loader that pins memory for one, go on as they please.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            yield

    def replay(self) -> None:
        """Runs it on the current stream, with fresh random numbers."""
        self._graph.replay()


def a_profiler_listens() -> bool:
    """Whether a tool that shows NVTX ranges is attached to this process."""
    return "NVTX_INJECTION64_PATH" in os.environ


def push_range(name: str) -> None:
    """Begins an NVTX range."""
    torch.cuda.nvtx.range_push(name)


def pop_range() -> None:
    """Ends it."""
    torch.cuda.nvtx.range_pop()
