"""Notices when submodules, parameters or buffers of modules are replaced by other objects."""

from collections.abc import Iterable
from typing import Any

from torch import nn


class ModuleWatch:
    """The submodules, parameters and buffers of some modules.

    Attributes:
        modules: the modules and all inside them, each once, as of the last call of ``changed``.
    """

    modules: list[nn.Module]

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self._roots = list(roots)
        self._seen: list[int] | None = None
        self.changed()

    def changed(self) -> bool:
        """Whether any of them is another object than at the last call."""
        if self._seen is not None and self._seen == self._ids():
            return False
        self.modules = list(dict.fromkeys(m for root in self._roots for m in root.modules()))
        self._tables: list[dict[str, Any]] = [
            table for m in self.modules for table in (m._modules, m._parameters, m._buffers)
        ]
        self._seen = self._ids()
        return True

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, each once."""
        held = (p for m in self.modules for p in m._parameters.values() if p is not None)
        return list(dict.fromkeys(held))

    def _ids(self) -> list[int]:
        return [id(value) for table in self._tables for value in table.values()]
