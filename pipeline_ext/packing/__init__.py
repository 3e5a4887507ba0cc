"""Many tensors as one contiguous buffer, one message: its layout, and what fills and empties it."""

from .arrays import as_tensors
from .interface import Packer, packer
from .layout import ALIGNMENT, Layout, Slot, aligned

__all__ = ["ALIGNMENT", "Layout", "Packer", "Slot", "aligned", "as_tensors", "packer"]
