"""Layers whose parameters torch's ``fully_shard`` has spread over replicas."""

import sys
from collections.abc import Iterable

from torch import nn


class ShardedLayers:
    """Those of some modules.

    Their parameters are gathered in the first forward of a step, and their gradients reduced in the last
    backward; in between they stay whole. So replicas communicate in one order, whatever order they compute in.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        fsdp = sys.modules.get("torch.distributed.fsdp")  # which takes long to import, and has sharded nothing yet
        layers = (layer for module in modules for layer in module.modules())
        self._layers = [layer for layer in layers if fsdp and isinstance(layer, fsdp.FSDPModule)]
        self.parameters = {p for layer in self._layers for p in layer.parameters()}
        self._left = 0
        self._syncs = True

    def __bool__(self) -> bool:
        return bool(self._layers)

    def begin(self, backwards: int, syncs: bool) -> None:
        """Begins a step of so many backwards; unless it ``syncs``, gradients are added up unreduced."""
        self._left = backwards
        self._syncs = syncs
        for layer in self._layers:
            layer.set_reshard_after_forward(False, recurse=False)
            layer.set_reshard_after_backward(False, recurse=False)
            layer.set_requires_gradient_sync(False, recurse=False)
            layer.set_is_last_backward(False)

    def begin_backward(self) -> None:
        """Called as each backward begins."""
        self._left -= 1
        if self._left == 0:
            for layer in self._layers:
                layer.set_reshard_after_backward(True, recurse=False)
                layer.set_requires_gradient_sync(self._syncs, recurse=False)
                layer.set_is_last_backward(True)

    def end(self) -> None:
        """Frees the gathered parameters: those of the next step may be others."""
        for layer in self._layers:
            layer.reshard()
