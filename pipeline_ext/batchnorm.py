"""Batch norm beside recomputation: refused, since two forwards would race for its buffers."""

import threading
from collections.abc import Callable, Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import PipelineError


class RecomputationGuard:
    """Raises when a batch norm in training mode is recomputed inside a backward task.

    With ``overlap=True`` another microbatch's forward may run beside it, and both update the running
    statistics.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._thread = threading.local()
        self._handles = [
            layer.register_forward_pre_hook(self._check)
            for module in modules
            for layer in module.modules()
            if isinstance(layer, _BatchNorm)
        ]

    def watch(self, backward: Callable[[int], None]) -> Callable[[int], None]:
        """``backward`` as the guard needs to see it."""
        if not self._handles:
            return backward

        def watched(m: int) -> None:
            self._thread.in_backward = True
            try:
                backward(m)
            finally:
                self._thread.in_backward = False

        return watched

    def remove(self) -> None:
        """Takes the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    def _check(self, layer: nn.Module, _inputs: tuple) -> None:
        if layer.training and getattr(self._thread, "in_backward", False):
            raise PipelineError(
                "batch norm is recomputed by activation checkpointing while another microbatch's "
                "forward may run (overlap=True), and both would update its running statistics; use "
                "overlap=False, or leave the batch norm out of the checkpointed part"
            )
