"""Where ``cut`` is found by users; ``pipeline_ext.model.cut`` has it."""

from .model.cut import cut

__all__ = ["cut"]
