"""What an optimizer keeps, by the names of its parameters instead of their numbers.

Laid out as ``get_optimizer_state_dict`` of torch.distributed.checkpoint does with
``flatten_optimizer_state_dict=True``, below "optimizer". That function is not used, for it takes a step with an
optimizer that has taken none, and finds no parameter without state, nor a tied one by its second name.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..errors import InvalidArgument
from .unsplit import UnsplitModel

_STATE = "optimizer.state."
_GROUPS = "optimizer.param_groups."
BEGINNINGS = (_STATE, _GROUPS)  # of all entries of an optimizer

Names = dict[nn.Parameter, list[str]]  # one of a tied parameter for each layer that holds it


def names(model: UnsplitModel | nn.Module, optimizer: torch.optim.Optimizer) -> Names:
    """Of each of the optimizer's parameters. Raises InvalidArgument for one that is not the model's."""
    found: Names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(parameter, []).append(name)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in held:
        if parameter not in found:
            raise InvalidArgument(
                f"the optimizer holds a parameter of shape {list(parameter.shape)} that is not the model's; "
                "give one made of model.parameters(), and save what else is trained yourself"
            )
    return {parameter: found[parameter] for parameter in held}


def by_name(optimizer: torch.optim.Optimizer, names: Names) -> dict[str, Any]:
    """What an optimizer keeps of each parameter, and its settings; a tied parameter's under all its names.

    Raises InvalidArgument for what cannot be laid out so.
    """
    found = {}
    for group in optimizer.param_groups:
        settings = _settings(group)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            nested = [key for key, value in state.items() if isinstance(value, dict | list | tuple)]
            if nested:
                raise InvalidArgument(
                    f"{type(optimizer).__name__} keeps {nested[0]!r}, which is neither a tensor nor a number "
                    "and cannot be saved by name; leave it out, and save its state_dict() yourself"
                )
            for name in names[parameter]:
                found |= {f"{_STATE}{name}.{key}": value for key, value in state.items()}
                found |= {f"{_GROUPS}{name}.{key}": value for key, value in settings.items()}
    return found


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def room_for(entries: Mapping[str, Any], names: Names) -> dict[str, Tensor | None]:
    """All that a checkpoint with these entries holds of the parameters, with tensors to read it into.

    Raises InvalidArgument where it holds nothing of one.
    """
    found: dict[str, list[str]] = {}
    for key in entries:
        if key.startswith(BEGINNINGS):
            found.setdefault(_split(key)[1], []).append(key)
    for name, *_ in names.values():
        if name not in found:
            raise InvalidArgument(f"it holds nothing that an optimizer keeps of {name!r}")
    return {
        key: _empty(entries[key], parameter) for parameter, (name, *_) in names.items() for key in found[name]
    }


def _empty(entry: Any, parameter: nn.Parameter) -> Tensor | None:
    """A tensor to read an entry into, cut as the parameter is; None for what is no tensor."""
    if not isinstance(entry, TensorStorageMetadata):
        return None
    dtype = entry.properties.dtype
    if isinstance(parameter, DTensor) and entry.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype)
    return torch.empty(entry.size, dtype=dtype)


def _split(key: str) -> tuple[str, str, str]:
    """The beginning, the parameter's name and the end of an optimizer's entry."""
    beginning = _STATE if key.startswith(_STATE) else _GROUPS
    name, _, end = key.removeprefix(beginning).rpartition(".")
    return beginning, name, end


def positional(optimizer: torch.optim.Optimizer, names: Names, kept: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizer's ``state_dict`` with what was ``kept`` by name.

    Raises InvalidArgument where the parameters of a group had different settings.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in kept.items():
        beginning, name, end = _split(key)
        found.setdefault((beginning, name), {})[end] = value
    packed = optimizer.state_dict()
    state, groups = {}, []
    for group, numbered in zip(optimizer.param_groups, packed["param_groups"]):
        first_names = [names[parameter][0] for parameter in group["params"]]
        groups.append(numbered | _common([(name, found[_GROUPS, name]) for name in first_names]))
        state |= {
            number: found[_STATE, name]
            for number, name in zip(numbered["params"], first_names)
            if (_STATE, name) in found
        }
    return packed | {"state": state, "param_groups": groups}


def _common(settings: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The settings of a group, all of whose parameters had the same."""
    if not settings:
        return {}
    first, common = settings[0]
    for name, other in settings:
        if other != common:
            raise InvalidArgument(
                f"{first!r} and {name!r} are in one group of the optimizer, and had different settings when "
                "it was saved; make the groups as they were"
            )
    return common
