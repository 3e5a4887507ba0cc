"""Modules in evaluation mode for a while."""

import contextlib
from collections.abc import Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def evaluation_mode(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Inside it, the modules and all inside them are in evaluation mode; then each is in its own again."""
    training = [module for root in roots for module in root.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
