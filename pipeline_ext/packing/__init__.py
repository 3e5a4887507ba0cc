"""Many tensors as one contiguous buffer, one message: its layout, and the kernel that fills and empties it."""

from .layout import ALIGNMENT, Layout, Slot
from .packer import Packer

__all__ = ["ALIGNMENT", "Layout", "Packer", "Slot"]
