"""An optimizer's state, by the names of parameters instead of their numbers.

The layout is that of ``get_optimizer_state_dict`` of torch.distributed.checkpoint with
``flatten_optimizer_state_dict=True``, below "optimizer". That function is not used: it takes a step if the
optimizer has taken none, and misses parameters without state and the second names of tied parameters.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgument
from .unsplit import UnsplitModel

_STATE = "optimizer.state."
_GROUPS = "optimizer.param_groups."
PREFIXES = (_STATE, _GROUPS)  # of all entries of an optimizer

Names = dict[nn.Parameter, list[str]]  # a tied parameter has a name for each layer that holds it


def names(model: UnsplitModel | nn.Module, optimizer: torch.optim.Optimizer) -> Names:
    """The names of the optimizer's parameters. Raises InvalidArgument for a parameter of another model."""
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
    """The optimizer's state and settings of each parameter; those of a tied parameter under all its names.

    Raises InvalidArgument for nested state, which this layout cannot hold.
    """
    found: dict[str, Any] = {}
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


def entries(keys: Iterable[str], names: Names) -> dict[str, nn.Parameter]:
    """The entries of a checkpoint for these parameters, under one name of each, with the parameter.

    Raises InvalidArgument if there are no entries for one of them.
    """
    found: dict[str, list[str]] = {}
    for key in keys:
        if key.startswith(PREFIXES):
            found.setdefault(_split(key)[1], []).append(key)
    for name, *_ in names.values():
        if name not in found:
            raise InvalidArgument(f"it holds nothing that an optimizer keeps of {name!r}")
    return {key: parameter for parameter, (name, *_) in names.items() for key in found[name]}


def _split(key: str) -> tuple[str, str, str]:
    """Splits the key of an entry into prefix, name of the parameter and key of the state or setting."""
    prefix = _STATE if key.startswith(_STATE) else _GROUPS
    name, _, own = key.removeprefix(prefix).rpartition(".")
    return prefix, name, own


def positional(optimizer: torch.optim.Optimizer, names: Names, kept: Mapping[str, Any]) -> dict[str, Any]:
    """A ``state_dict`` for the optimizer from state and settings by name, as ``by_name`` returns them.

    Raises InvalidArgument if the parameters of a group have different settings.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in kept.items():
        prefix, name, own = _split(key)
        found.setdefault((prefix, name), {})[own] = value
    packed = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    groups = []
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
    """The settings of a group, which all its parameters have. Raises InvalidArgument if they differ."""
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
