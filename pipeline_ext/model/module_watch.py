"""Notices when submodules, parameters or buffers of modules are replaced by other objects."""

from collections.abc import Iterable

from torch import nn


class ModuleWatch:
    """The submodules, parameters and buffers of some modules.

    Attributes:
        modules: the modules and all inside them, each once, as of the last call of ``changed``.
        parameters: all their parameters, each once, as of that call.
    """

    modules: list[nn.Module]
    parameters: list[nn.Parameter]

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self._roots = list(roots)
        self._seen: list[int] | None = None
        self.changed()

    def changed(self) -> bool:
        """Whether any of them is another object than at the last call."""
        if self._seen is not None and self._seen == self._ids():
            return False
        self.modules = list(dict.fromkeys(m for root in self._roots for m in root.modules()))
        held = (p for m in self.modules for p in m._parameters.values() if p is not None)
        self.parameters = list(dict.fromkeys(held))
        self._seen = self._ids()
        return True

    def _ids(self) -> list[int]:
        return [
            id(value)
            for m in self.modules
            for table in (m._modules, m._parameters, m._buffers)
            for value in table.values()
        ]
