"""Which modules of a model are units, whose calls are shared out among stages."""

from collections.abc import Collection, Iterator

from torch import nn

_LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def coarse_units(model: nn.Module, opened: Collection[nn.Module] = ()) -> dict[nn.Module, str]:
    """The outermost units, with their names: members of lists, and modules that have no lists inside.

    A list is an nn.ModuleList, nn.Sequential or nn.ModuleDict. A list of one member is opened, and so are the
    modules in ``opened``: what is inside them are units. A module that has several names counts once.
    """
    units: dict[nn.Module, str] = {}
    for name, child in _children(model):
        _add(units, child, name, member=_is_list(model), opened=opened)
    return units


def openable(unit: nn.Module) -> bool:
    """Whether a unit has lists of several members inside, so that it can be cut itself."""
    return any(_is_list(module) and len(module._modules) > 1 for module in unit.modules())


def _add(
    units: dict[nn.Module, str], module: nn.Module, name: str, *, member: bool, opened: Collection[nn.Module]
) -> None:
    called = not isinstance(module, (nn.ModuleList, nn.ModuleDict))  # others cannot be
    if called and module not in opened and (member or not openable(module)):
        units.setdefault(module, name)
        return
    several = _is_list(module) and len(list(module.children())) > 1
    for child_name, child in _children(module):
        _add(units, child, f"{name}.{child_name}", member=several, opened=opened)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None:
            yield name, child


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, _LISTS)
