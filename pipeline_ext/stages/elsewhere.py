"""Stages that other processes run: what their modules hold here is not what they computed."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import InvalidArgument

_SETTINGS = (int, str, bool)


class _NotHere(nn.Module):
    """Refuses to read what a forward may have left behind; modules can be listed, and asked for their type."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name.startswith("_") or name == "training" or isinstance(value, (*_SETTINGS, nn.Module)):
            return value
        kept = object.__getattribute__(self, "__dict__")
        if name in kept or name in kept["_buffers"]:
            raise InvalidArgument(
                f"loss_fn reads {name} of a {type(self).__name__} in a stage of another process, which does "
                "not run here; give losses that a stage's layers keep in attributes as stage_loss= of "
                "Pipeline, or return them from their own stage with pipeline_ext.WithLoss"
            )
        return value


@contextlib.contextmanager
def refused(stages: Mapping[int, nn.Module]) -> Iterator[None]:
    """Inside it, reading what modules of ``stages`` hold raises InvalidArgument."""
    modules = list(dict.fromkeys(m for stage in stages.values() for m in stage.modules()))
    before = [(module, type(module)) for module in modules]
    try:
        for module, kind in before:
            with contextlib.suppress(TypeError):  # a class of another memory layout
                module.__class__ = _not_here(kind)  # type: ignore[arg-type]  # mypy doubts classes' hashes
        yield
    finally:
        for module, kind in before:
            module.__class__ = kind


@functools.cache
def _not_here(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_NotHere, kind), {})
