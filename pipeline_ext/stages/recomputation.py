"""Refuses to recompute batch norm (activation checkpointing) where other running tasks would disturb it."""

import threading
from collections.abc import Callable, Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import PipelineError


def _eager_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The module and its submodules, except compiled ones: a hook could break their graph."""
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        return
    yield module
    for child in module.children():
        yield from _eager_layers(child)


_thread = threading.local()  # not an attribute of the guard, which is copied and saved with the hooked layers


class RecomputationGuard:
    """Raises when a backward task recomputes batch norm in training mode, with ``overlap``.

    Another microbatch's forward may run beside the recomputed one, and both update the running statistics.
    Layers of compiled modules are not watched.
    """

    def __init__(self, modules: Iterable[nn.Module], *, overlap: bool) -> None:
        layers = {layer for module in modules for layer in _eager_layers(module)} if overlap else set()
        self._handles = [
            layer.register_forward_pre_hook(self._check) for layer in layers if isinstance(layer, _BatchNorm)
        ]

    def watch(self, backward: Callable[[int], None]) -> Callable[[int], None]:
        """Wraps ``backward``; the guard raises only inside it."""
        if not self._handles:
            return backward

        def watched(m: int) -> None:
            _thread.in_backward = True
            try:
                backward(m)
            finally:
                _thread.in_backward = False

        return watched

    def remove(self) -> None:
        """Takes the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    def _check(self, layer: nn.Module, _inputs: tuple) -> None:
        if layer.training and getattr(_thread, "in_backward", False):
            raise PipelineError(
                "batch norm is recomputed by activation checkpointing while another microbatch's forward may "
                "run (overlap, as on GPUs by default), and both would update its running statistics; use "
                "overlap=False, or leave the batch norm out of the checkpointed part"
            )
