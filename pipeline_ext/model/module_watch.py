"""What modules hold at the moment, for those who must notice when that is replaced."""

from collections.abc import Iterable
from typing import Any

from torch import nn


class Holdings:
    """The submodules, parameters and buffers of some modules.

    Attributes:
        modules: those and all inside them, each once, as of the last ``look``.
    """

    modules: list[nn.Module]

    def __init__(self, roots: Iterable[nn.Module]) -> None:
        self._roots = list(roots)
        self._look: list[int] | None = None
        self.look()

    def look(self) -> bool:
        """Looks again; returns whether anything is another object than before."""
        if self._look is not None and self._look == self._ids():
            return False
        self.modules = list(dict.fromkeys(m for root in self._roots for m in root.modules()))
        self._tables: list[dict[str, Any]] = [
            table for m in self.modules for table in (m._modules, m._parameters, m._buffers)
        ]
        self._look = self._ids()
        return True

    def parameters(self) -> list[nn.Parameter]:
        """All of them, each once."""
        held = (p for m in self.modules for p in m._parameters.values() if p is not None)
        return list(dict.fromkeys(held))

    def _ids(self) -> list[int]:
        return [id(value) for table in self._tables for value in table.values()]
