"""Recognises DTensors and fully sharded modules without importing them from torch, which takes seconds.

No object of a class exists before the module of the class is imported.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether it is a torch.distributed.tensor.DTensor."""
    return isinstance(value, imported_class("torch.distributed.tensor", "DTensor"))


def is_fully_sharded(module: object) -> "TypeGuard[FSDPModule]":
    """Whether it is a module that ``fully_shard`` was applied to."""
    return isinstance(module, imported_class("torch.distributed.fsdp", "FSDPModule"))


def imported_class(module: str, name: str) -> Any:
    """The class, for isinstance; an empty tuple if its module was not imported."""
    return getattr(sys.modules.get(module), name, ())
