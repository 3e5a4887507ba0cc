"""The actions of a schedule for stages in FSDP2: UNSHARD, RESHARD and REDUCE_GRAD."""

from torch import nn
from torch.distributed.fsdp import FSDPModule, UnshardHandle

from ..stages.stage import Stage
from ..stages.wrapped import layers_of, reduce_sharded


def unshard(module: nn.Module) -> list[UnshardHandle]:
    """Starts to gather the parameters; returns the handles to wait for."""
    handles = [layer.unshard(async_op=True) for layer in _sharded(module)]
    return [handle for handle in handles if handle is not None]


def reshard(module: nn.Module) -> None:
    """Frees the gathered parameters."""
    for layer in _sharded(module):
        layer.reshard()


def reduce(stage: Stage) -> None:
    """Reduces the gradients and frees the gathered parameters."""
    layers = layers_of(FSDPModule, stage)
    reduce_sharded(layers)
    for layer in layers:
        layer.reshard()


def _sharded(module: nn.Module) -> list[FSDPModule]:
    """As in torch none if the module itself is not sharded: its layers gather in their forwards."""
    if not isinstance(module, FSDPModule):
        return []
    return [layer for layer in module.modules() if isinstance(layer, FSDPModule)]
