"""The caller's thread state, carried to the threads that run its stages.

Grad mode needs no carrying: a step requires it on, and an evaluation turns it off. Autocast is entered
task by task, without its weight cache, which threads would share; backward tasks run without autocast,
as PyTorch recommends.
"""

import contextlib
import threading
from typing import NamedTuple

import torch


class CallerContext(NamedTuple):
    """The parts of the calling thread's state that a stage's code may depend on."""

    autocast: tuple[tuple[str, torch.dtype], ...]  # device type and dtype, where enabled
    num_threads: int  # intra-op
    default_device: torch.device

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
        )

    def apply(self) -> None:
        """Sets the lasting state of the worker thread that calls it to the caller's."""
        if getattr(_worker, "applied", None) is self:
            return
        torch.set_num_threads(self.num_threads)
        if torch.get_default_device() != self.default_device:
            is_cpu = self.default_device == torch.device("cpu")
            torch.set_default_device(None if is_cpu else self.default_device)
        _worker.applied = self

    def forward(self) -> contextlib.AbstractContextManager:
        """The state in which one forward task runs."""
        if not self.autocast:
            return _NOTHING
        stack = contextlib.ExitStack()
        for device, dtype in self.autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
        return stack


_NOTHING: contextlib.AbstractContextManager = contextlib.nullcontext()
_worker = threading.local()
