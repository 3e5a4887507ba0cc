"""Abandoned threads: they may come back, but must not touch ``.grad``."""

import threading
from collections.abc import Iterable

from torch import Tensor, nn

from ..errors import DeadPipeline

_thread = threading.local()


def this_thread() -> object:
    """A token of the calling thread; unlike the thread's number it is never reused."""
    try:
        return _thread.token
    except AttributeError:
        _thread.token = object()
        return _thread.token


def lock_out(threads: Iterable[object], parameters: Iterable[nn.Parameter]) -> None:
    """Stops backwards that run on one of ``threads`` from leaving gradients in ``parameters``.

    A hook on a parameter runs just before a gradient is added to it, even if the backward began before the
    hook was registered. A backward that hangs inside another hook of the parameter is past this one; the
    gradient that it then adds is removed again.
    """
    lost = set(threads)
    if not lost:
        return

    def refuse(grad: Tensor) -> None:
        if this_thread() in lost:
            raise DeadPipeline("this backward belongs to a step that was given up")

    def remove(parameter: Tensor) -> None:
        if this_thread() in lost:
            parameter.grad = None

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_hook(refuse)
            parameter.register_post_accumulate_grad_hook(remove)
