"""All that a checkpoint holds of a model and its optimizer, by name."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import optimizer_state
from .unsplit import UnsplitModel, at_rest, trained


def state_of(
    model: UnsplitModel | nn.Module, optimizer: torch.optim.Optimizer | None, what: str
) -> dict[str, Any]:
    """The state that this process holds. Raises PipelineError while a step runs; ``what`` was called meanwhile.

    Raises InvalidArgument for an optimizer of other parameters, or with state that has no name.
    """
    with at_rest(model, what):
        state = dict(trained(model).state_dict())
    if optimizer is not None:
        state |= optimizer_state.by_name(optimizer, optimizer_state.names(model, optimizer))
    return state


def put_state(
    model: UnsplitModel | nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    of_optimizer: dict[str, Any],
    what: str,
) -> None:
    """Copies in what this process holds: ``state`` by name, and a ``state_dict`` of the optimizer.

    Raises PipelineError while a step runs; ``what`` was called meanwhile. After Ctrl-C it is all there.
    """

    def put(module: nn.Module) -> None:
        whole = module.state_dict()  # a plain dict would lose the versions of modules
        whole.update(state)
        module.load_state_dict(whole)
        if optimizer is not None:
            optimizer.load_state_dict(of_optimizer)

    with at_rest(model, what):
        try:
            put(trained(model))
        except (KeyboardInterrupt, SystemExit):
            put(trained(model))  # else the model would be of two checkpoints
            raise
