"""Lets one thread see other parameters in modules than all others see."""

import contextlib
import copy
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

Replacements = Mapping[nn.Parameter, nn.Parameter]
_NONE: Replacements = {}


class _Thread(threading.local):
    shown: Replacements = _NONE


_thread = _Thread()


@contextlib.contextmanager
def shown(replacements: Replacements) -> Iterator[None]:
    """Inside it, this thread sees these in place of parameters, in modules that are ``prepared``."""
    before, _thread.shown = _thread.shown, replacements
    try:
        yield
    finally:
        _thread.shown = before


def prepare(modules: Iterable[nn.Module]) -> None:
    """Makes ``shown`` work in the modules themselves, not in those inside them."""
    for module in modules:
        if type(module._parameters) is dict and module._parameters:
            module.__dict__["_parameters"] = _Table(module._parameters)


class _Table(dict):
    """A module's parameters by name. A copy, also with pickle, is a plain dict."""

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        return _thread.shown.get(found, found)

    def get(self, name: str, default: Any = None) -> Any:
        found = super().get(name, default)
        return _thread.shown.get(found, found)

    def items(self) -> Any:
        return super().items() if _thread.shown is _NONE else [(name, self[name]) for name in self]

    def values(self) -> Any:
        return super().values() if _thread.shown is _NONE else [self[name] for name in self]

    def __reduce__(self) -> Any:
        return dict, (dict(super().items()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(super().items()), memo)
