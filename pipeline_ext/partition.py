"""The public place of ``cut``."""

from .model.cut import cut

__all__ = ["cut"]
