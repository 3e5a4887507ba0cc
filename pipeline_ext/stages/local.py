"""The stages of the model that this process runs."""

from collections.abc import Callable, Sequence

from torch import nn

from ..errors import InvalidArgument

StageLike = nn.Module | Callable[[], nn.Module]


def local_stages(
    stages: Sequence[StageLike], rank_of_stage: Sequence[int], holds: Callable[[int], bool]
) -> dict[int, nn.Module]:
    """The modules of this process's stages, by stage; ``holds(rank)`` says whether it runs a rank.

    Stages given as functions are called. Raises InvalidArgument if one does not return a module.
    """
    return {index: _made(index, stage) for index, stage in enumerate(stages) if holds(rank_of_stage[index])}


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
