"""State that the processes of a pipeline hold in parts, whole in process 0."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..calls.values import is_elsewhere
from ..pipeline import Pipeline
from ..processes.gather import to_first


def whole_state(pipe: Pipeline) -> dict[str, Any] | None:
    """The state of the unsplit model; None in other processes than 0. All processes call it together."""
    return _merged(pipe.state_dict())


def whole_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """The state of an optimizer that has all parameters of the model, those of other processes on meta.

    None in other processes than 0. All processes call it together.
    """
    packed = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    here = {n: state for n, state in packed["state"].items() if not is_elsewhere(parameters[n])}
    state = _merged(here)
    return None if state is None else {**packed, "state": dict(sorted(state.items()))}


def _merged(part: Mapping[Any, Any]) -> dict[Any, Any] | None:
    part = pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), dict(part))
    parts = to_first(part)
    return None if parts is None else {key: value for each in reversed(parts) for key, value in each.items()}
