"""The stages of the model that this process runs."""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

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


class Initialise(Protocol):
    """``initialise`` of a certain model."""

    def __call__(self, *, modules: Sequence[nn.Module], replicas: dist.ProcessGroup | None) -> None: ...


def initialise(
    within: nn.Module | None = None,
    around: Sequence[nn.Module] = (),
    *,
    modules: Sequence[nn.Module],
    replicas: dist.ProcessGroup | None,
) -> None:
    """Gives parameters and buffers on the meta device memory and values, the same in all ``replicas``.

    A layer is initialised by the ``_init_weights`` of a model around it, as those of transformers have, or by
    its own ``reset_parameters``.

    Args:
        within: the model that ``modules`` are of, if it is one module.
        around: modules of it of which only the buffers are needed, and the parameters that ``modules`` have
        too. modules: those of this process.
        replicas: the processes with the same modules.

    Raises:
        InvalidArgument: for a layer that cannot be initialised.
    """
    used = {p for module in modules for p in module.parameters()}
    made: dict[Tensor, Tensor] = {}  # layers that shared a tensor share it again
    _initialise(around, _initialisers(within), used, made)
    _initialise(
        dict.fromkeys(layer for module in modules for layer in module.modules()),
        _initialisers(within),
        used,
        made,
    )
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


def _initialisers(within: nn.Module | None) -> dict[nn.Module, Callable[[nn.Module], None]]:
    """By module: the ``_init_weights`` of the innermost model around it that has one."""
    found: dict[nn.Module, Callable[[nn.Module], None]] = {}
    for module in [] if within is None else within.modules():  # outer ones first
        initialise = getattr(module, "_init_weights", None)
        if callable(initialise):
            found |= dict.fromkeys(module.modules(), initialise)
    return found


def _initialise(
    owners: Iterable[nn.Module],
    others: Mapping[nn.Module, Callable[[nn.Module], None]],
    used: Collection[Tensor],
    made: dict[Tensor, Tensor],
) -> None:
    """Gives buffers on the meta device, and the parameters that are ``used``, memory and values."""
    for owner in owners:
        tables: tuple[dict[str, Any], ...] = (owner._parameters, owner._buffers)
        on_meta = [
            (table, name)
            for table in tables
            for name, tensor in table.items()
            if tensor is not None
            and tensor.is_meta
            and (not isinstance(tensor, nn.Parameter) or tensor in used)
        ]
        if not on_meta:
            continue
        reset = getattr(owner, "reset_parameters", None)
        if owner in others:
            reset = functools.partial(others[owner], owner)
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
