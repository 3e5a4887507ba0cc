"""Threads that were given up as lost: they may come back, but may not touch ``.grad``."""

import threading
from collections.abc import Iterable

from torch import Tensor, nn

from ..errors import DeadPipeline

_thread = threading.local()


def this_thread() -> object:
    """What stands for the calling thread; unlike its number it is never used again."""
    try:
        return _thread.token
    except AttributeError:
        _thread.token = object()
        return _thread.token


def lock_out(threads: Iterable[object], parameters: Iterable[nn.Parameter]) -> None:
    """Lets no backward that runs on one of ``threads`` leave a gradient in ``parameters`` any more.

    A hook on a parameter is asked just before a gradient is added to it, also if the backward had begun
    before the hook was registered. A backward that was lost inside another hook of the parameter has been
    asked already; what it then adds is taken away again.
    """
    lost = set(threads)
    if not lost:
        return

    def refuse(grad: Tensor) -> None:
        if this_thread() in lost:
            raise DeadPipeline("this backward belongs to a step that was given up")

    def take_away(parameter: Tensor) -> None:
        if this_thread() in lost:
            parameter.grad = None

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_hook(refuse)
            parameter.register_post_accumulate_grad_hook(take_away)
