"""Refuses to recompute layers (activation checkpointing) that other running tasks would disturb."""

import threading
from collections.abc import Callable, Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

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
    """Raises when a backward task recomputes a layer that other tasks disturb.

    Batch norm in training mode, with ``overlap``: another microbatch's forward may run beside the
    recomputed one, and both update the running statistics. Dropout, with several threads: the CPU has one
    random generator for the process, so the recomputed mask may differ from the forward's. Layers of
    compiled modules are not watched.
    """

    def __init__(self, modules: Iterable[nn.Module], *, overlap: bool, threads: int) -> None:
        self._handles = []
        for layer in {layer for module in modules for layer in _eager_layers(module)}:
            if overlap and isinstance(layer, _BatchNorm):
                self._handles.append(layer.register_forward_pre_hook(self._check_batch_norm))
            if threads > 1 and isinstance(layer, _DropoutNd):
                self._handles.append(layer.register_forward_pre_hook(self._check_dropout))

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

    def _recomputes(self) -> bool:
        return getattr(_thread, "in_backward", False)

    def _check_batch_norm(self, layer: nn.Module, _inputs: tuple) -> None:
        if layer.training and self._recomputes():
            raise PipelineError(
                "batch norm is recomputed by activation checkpointing while another microbatch's forward may "
                "run (overlap, as on GPUs by default), and both would update its running statistics; use "
                "overlap=False, or leave the batch norm out of the checkpointed part"
            )

    def _check_dropout(self, layer: nn.Module, _inputs: tuple) -> None:
        if layer.training and _probability(layer) > 0 and self._recomputes():
            raise PipelineError(
                "dropout is recomputed by activation checkpointing while other ranks draw from the "
                "process's one random generator, so its mask would differ from the forward's; leave the "
                "dropout out of the checkpointed part, or use one rank (a schedule that holds several "
                'stages on each, devices=["cpu"])'
            )


def _probability(layer: nn.Module) -> float:
    assert isinstance(layer, _DropoutNd)
    return layer.p
