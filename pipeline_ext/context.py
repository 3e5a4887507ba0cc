"""The caller's thread state, carried to the threads that run its stages.

Grad mode needs no carrying: a step requires it on, and an evaluation turns it off. Autocast is entered
task by task, without its weight cache, which threads would share; backward tasks run without autocast,
as PyTorch recommends.
"""

import contextlib
import ctypes
import functools
import os
import threading
from typing import Any, NamedTuple

import torch


class CallerContext(NamedTuple):
    """What of the calling thread's state a stage's code may depend on."""

    autocast: tuple[tuple[str, torch.dtype], ...]  # device type and dtype, where enabled
    num_threads: int  # intra-op
    default_device: torch.device
    profiled: bool  # by torch.profiler

    @classmethod
    def of_this_thread(cls) -> "CallerContext":
        return cls(
            autocast=tuple(
                (device, torch.get_autocast_dtype(device))
                for device in ("cpu", "cuda")
                if torch.is_autocast_enabled(device)
            ),
            num_threads=torch.get_num_threads(),
            default_device=torch.get_default_device(),
            profiled=torch.autograd._profiler_enabled() and _child_profiler() is not None,
        )

    def apply(self) -> None:
        """Makes the calling worker thread's lasting state that of the caller."""
        if getattr(_worker, "applied", None) is self:
            return
        torch.set_num_threads(self.num_threads)
        if torch.get_default_device() != self.default_device:
            is_cpu = self.default_device == torch.device("cpu")
            torch.set_default_device(None if is_cpu else self.default_device)
        _worker.applied = self

    def forward(self) -> contextlib.AbstractContextManager:
        """The state in which one forward task runs."""
        if not self.autocast and not self.profiled:
            return _NOTHING
        stack = contextlib.ExitStack()
        if self.profiled:
            stack.enter_context(_profiled_thread())
        for device, dtype in self.autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        return stack

    def backward(self) -> contextlib.AbstractContextManager:
        """The state in which one backward task runs."""
        return _profiled_thread() if self.profiled else _NOTHING


_NOTHING: contextlib.AbstractContextManager = contextlib.nullcontext()
_worker = threading.local()


@functools.cache
def _child_profiler() -> tuple[Any, Any] | None:
    """libtorch's functions by which a thread joins and leaves a running profiler, if it has them.

    torch.profiler records the thread that started it; torch/csrc/autograd/profiler_kineto.h declares
    these for other threads, and Python has no binding of them.
    """
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(path)
        return tuple(
            library[f"_ZN5torch8autograd8profiler{len(name)}{name}Ev"]
            for name in ("enableProfilerInChildThread", "disableProfilerInChildThread")
        )
    except (OSError, AttributeError):
        return None


@contextlib.contextmanager
def _profiled_thread():
    enable, disable = _child_profiler()
    enable()
    try:
        yield
    finally:
        disable()
