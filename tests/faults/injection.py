"""The faults, as what a process does to itself or to the network of its node."""

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import torch
from torch import nn

from . import namespaces

_SLOW = 64  # kilobits a second

Inject = Callable[[Any], Any]  # takes what the moment is about, and gives what to go on with


class Moments:
    """Watches for the moment of a fault; the fault comes once."""

    def __init__(self, moment: str | None, inject: Inject, mark: Path, times: int = 1) -> None:
        """``moment``: None for a process without a fault. It is there when it is reached ``times`` times.

        ``mark`` is written just before the fault.
        """
        self._moment = moment
        self._inject = inject
        self._mark = mark
        self._left = times

    def reach(self, moment: str, value: Any = None) -> Any:
        """To be called at each moment. Returns ``value``, or what the fault makes of it."""
        if moment != self._moment:
            return value
        self._left -= 1
        if self._left != 0:
            return value
        self._mark.write_text(repr(time.monotonic()))
        return self._inject(value)

    def watch_files(self, moment_of_mode: dict[str, str]) -> None:
        """Reaches a moment, by the mode, whenever a file of tensors is opened."""

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and str(arguments[0]).endswith(".safetensors"):
                mode = (arguments[1] or "")[:1]
                if mode in moment_of_mode:
                    self.reach(moment_of_mode[mode], str(arguments[0]))

        sys.addaudithook(audit)


def complain(value: Any) -> None:
    raise ValueError("poisoned")


def hang(value: Any) -> None:
    processes.hang()


def run_out_of_memory(value: Any) -> None:
    torch.empty(1 << 50, dtype=torch.uint8)


def spoil_shape(value: Any) -> Any:
    """A result without its last column; a layer whose weight lacks one."""
    if isinstance(value, nn.Module):
        value.weight = nn.Parameter(value.weight[:, :-1])
        return value
    return value[..., :-1]


def spoil_number(value: Any) -> Any:
    return value * math.nan


def kill(value: Any) -> None:
    processes.die()


def stop(value: Any) -> None:
    processes.freeze()


def cut_off_a_while(value: Any) -> Any:
    namespaces.cut(5)
    return value


def cut_off(value: Any) -> Any:
    namespaces.cut()
    return value


def vanish(value: Any) -> None:
    """Dies without a word to the other node, whose connections stay half open."""
    namespaces.send_nothing(0)
    processes.die()


def slow_link(value: Any) -> Any:
    namespaces.slow_down(_SLOW)
    return value


def fill_disk(path: str) -> None:
    """Takes all that is left on the disk of ``path``, until ``free_disk``."""
    with _filler(path).open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            return


def free_disk(folder: Path) -> None:
    (folder / _FILLER).unlink(missing_ok=True)


def interrupt(value: Any) -> Any:
    os.kill(os.getpid(), signal.SIGINT)
    # Ctrl-C ends this in the main thread, also if another one gets the signal. A task goes on for a moment, so
    # that the step has not ended before the signal is seen.
    time.sleep(10 if threading.current_thread() is threading.main_thread() else 1)
    return value


_FILLER = "filler"


def _filler(path: str) -> Path:
    return Path(path).parents[1] / _FILLER
