"""Aliases of parameters: the same memory, and a ``.grad`` of their own."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from ..errors import InvalidArgument


class Holder(NamedTuple):
    """A module that holds a parameter under a name."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter

    def put(self, parameter: nn.Parameter) -> None:
        """The module now holds ``parameter`` in its place."""
        self.owner._parameters[self.name] = parameter

    def restore(self) -> None:
        """The module holds its own parameter again."""
        self.put(self.parameter)

    def is_current(self) -> bool:
        """Whether the module still holds the parameter."""
        return self.owner._parameters.get(self.name) is self.parameter


def holders(modules: Iterable[nn.Module]) -> Iterator[Holder]:
    """Every holder in the modules and inside them, each once."""
    for owner in dict.fromkeys(m for module in modules for m in module.modules()):
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield Holder(owner, name, parameter)


def alias(parameter: nn.Parameter) -> nn.Parameter:
    """A new alias of ``parameter``."""
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def check_no_hooks(parameters: Iterable[nn.Parameter], why: str) -> None:
    """Raises InvalidArgument for a parameter with a hook that would not run. ``why``: it would not."""
    for parameter in parameters:
        if parameter._backward_hooks:
            raise InvalidArgument(
                f"a parameter of shape {list(parameter.shape)} has a hook (register_hook), but {why}; change "
                "the gradient after the step, or in register_post_accumulate_grad_hook"
            )
