"""What a schedule lists beside its tasks for stages in FSDP2: gathering, letting go, reducing."""

from torch import nn
from torch.distributed.fsdp import FSDPModule, UnshardHandle

from ..stages.stage import Stage
from ..stages.wrapped import layers_of, reduce_sharded


def unshard(module: nn.Module) -> list[UnshardHandle]:
    """Begins to gather the parameters; returns what to wait for."""
    return [layer.unshard(async_op=True) for layer in _sharded(module)]


def reshard(module: nn.Module) -> None:
    """Lets go of the gathered parameters."""
    for layer in _sharded(module):
        layer.reshard()


def reduce(stage: Stage) -> None:
    """Reduces the gradients, and lets go of all that was gathered."""
    layers = layers_of(FSDPModule, stage)
    reduce_sharded(layers)
    for layer in layers:
        layer.reshard()


def _sharded(module: nn.Module) -> list[FSDPModule]:
    """As in torch, none of a module that is not sharded itself: they gather in their forwards."""
    if not isinstance(module, FSDPModule):
        return []
    return [layer for layer in module.modules() if isinstance(layer, FSDPModule)]
