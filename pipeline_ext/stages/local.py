"""The stages of the model that this process runs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InvalidArgument
from ..processes.connections import own_part
from .wrapped import reduced_in

StageLike = nn.Module | Callable[[], nn.Module]


def local_stages(
    stages: Sequence[StageLike], rank_of_stage: Sequence[int], holds: Callable[[int], bool]
) -> dict[int, nn.Module]:
    """The modules of this process's stages, by stage; ``holds(rank)`` says whether it runs a rank.

    Stages given as functions are called. Raises InvalidArgument if one does not return a module.
    """
    return {index: _made(index, stage) for index, stage in enumerate(stages) if holds(rank_of_stage[index])}


def initialise(modules: Sequence[nn.Module], replicas: dist.ProcessGroup | None) -> None:
    """Gives parameters on the meta device memory and values, the same in all ``replicas``.

    Raises InvalidArgument for a layer that cannot be initialised.
    """
    _initialise(modules)
    if replicas is not None:
        _make_equal(modules, replicas)


def _made(index: int, stage: StageLike) -> nn.Module:
    if isinstance(stage, nn.Module):
        return stage
    module = stage()
    if not isinstance(module, nn.Module):
        raise InvalidArgument(
            f"the function given for stage {index} returned a {type(module).__name__}; it must return the "
            "stage's nn.Module"
        )
    return module


def _initialise(modules: Sequence[nn.Module]) -> None:
    """Gives layers on the meta device memory, and values by calling their ``reset_parameters``."""
    made: dict[Tensor, Tensor] = {}  # layers that shared a tensor share it again
    for owner in dict.fromkeys(layer for module in modules for layer in module.modules()):
        tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        on_meta = [
            (table, name)
            for table in tables
            for name, tensor in table.items()
            if tensor is not None and tensor.is_meta
        ]
        if not on_meta:
            continue
        reset = getattr(owner, "reset_parameters", None)
        if not callable(reset):
            names = ", ".join(name for _, name in on_meta)
            raise InvalidArgument(
                f"{type(owner).__name__} has {names} on the meta device and no reset_parameters() that could "
                "initialise them; give it one, or make the stage on the CPU"
            )
        for table, name in on_meta:
            tensor = table[name]
            if tensor not in made:
                made[tensor] = _empty_like(tensor)
            table[name] = made[tensor]
        reset()


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _make_equal(modules: Sequence[nn.Module], replicas: dist.ProcessGroup) -> None:
    """Gives every replica the parameters and buffers of the first, except what wrapped stages reduce."""
    first = dist.get_process_group_ranks(replicas)[0]
    own = reduced_in(modules)
    with torch.no_grad():
        for tensor in dict.fromkeys(t for m in modules for t in (*m.parameters(), *m.buffers())):
            if tensor not in own:
                dist.broadcast(own_part(tensor), first, group=replicas)
