"""Many tensors in one contiguous buffer: its layout, and the packers that write and read it."""

from .arrays import as_tensors
from .interface import Packer, packer
from .layout import ALIGNMENT, Layout, Slot, aligned

__all__ = ["ALIGNMENT", "Layout", "Packer", "Slot", "aligned", "as_tensors", "packer"]
