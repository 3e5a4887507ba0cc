"""The stages of the model that this process runs."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InvalidArgument
from ..processes.connections import own_part
from ..processes.group import Processes
from .wrapped import reduced_in

StageLike = nn.Module | Callable[[], nn.Module]


def local_stages(
    stages: Sequence[StageLike], rank_of_stage: Sequence[int], processes: Processes | None
) -> dict[int, nn.Module]:
    """The modules of this process's stages, by stage; of one process, all.

    Those that are given as functions are made now. Raises InvalidArgument for what is no module.
    """
    return {
        index: _made(index, stage)
        for index, stage in enumerate(stages)
        if processes is None or rank_of_stage[index] == processes.rank
    }


def initialise(modules: Sequence[nn.Module], replicas: dist.ProcessGroup | None) -> None:
    """Gives what lies on the meta device memory and values, and all ``replicas`` the same.

    Raises InvalidArgument for what cannot be initialised.
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
            f"the function given for stage {index} returned a {type(module).__name__}; it is to return the "
            "stage's nn.Module"
        )
    return module


def _initialise(modules: Sequence[nn.Module]) -> None:
    """Gives layers on the meta device memory, and the values that their ``reset_parameters`` makes."""
    made: dict[Tensor, Tensor] = {}  # what several layers share they share again
    for owner in dict.fromkeys(layer for module in modules for layer in module.modules()):
        on_meta = [
            (table, name)
            for table in (owner._parameters, owner._buffers)
            for name, tensor in table.items()
            if tensor is not None and tensor.is_meta
        ]
        if not on_meta:
            continue
        if not hasattr(owner, "reset_parameters"):
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
        owner.reset_parameters()


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _make_equal(modules: Sequence[nn.Module], replicas: dist.ProcessGroup) -> None:
    """Gives every replica the first one's parameters and buffers; what is sharded is each one's own."""
    first = dist.get_process_group_ranks(replicas)[0]
    own = reduced_in(modules)
    with torch.no_grad():
        for tensor in dict.fromkeys(t for m in modules for t in (*m.parameters(), *m.buffers())):
            if tensor not in own:
                dist.broadcast(own_part(tensor), first, group=replicas)
