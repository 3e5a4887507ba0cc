"""Containers whose layers run without the container's own code.

Only an ``nn.Sequential`` that does nothing but run its layers can be taken apart. That is proved before, and
checked again at each step: hooks, a compiled or replaced forward, or another layer would be lost.
"""

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from torch import nn

from ..errors import InvalidArgument
from .slice import Slice


def own_code(module: nn.Module) -> str:
    """What ``module`` does besides running its children in order; empty if that is all."""
    kind = type(module)
    if not isinstance(module, nn.Sequential) or kind.forward is not nn.Sequential.forward:
        return "a forward of its own"
    if "forward" in vars(module):
        return "a forward that was replaced (as accelerate does for mixed precision)"
    if kind.__call__ is not nn.Module.__call__ or getattr(kind, "__iter__") is not nn.Sequential.__iter__:  # noqa: B009
        return "a __call__ or __iter__ of its own"
    if module._compiled_call_impl is not None:
        return "a compiled forward"
    if any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    ):
        return "hooks"
    own = [*module._parameters, *module._buffers]
    return f"parameters or buffers of its own ({', '.join(own)})" if own else ""


def only_runs_children(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether it can be taken apart: it runs its children in order, and does nothing else."""
    return not own_code(module)


def is_list_of_stages(model: Any) -> TypeGuard[list[Any] | tuple[Any, ...] | nn.ModuleList]:
    """Whether each member is a stage. An nn.ModuleList that has a forward is a model."""
    return isinstance(model, (list, tuple)) or (isinstance(model, nn.ModuleList) and not _runs(model))


def _runs(modules: nn.Module) -> bool:
    return type(modules).forward is not nn.ModuleList.forward or "forward" in vars(modules)


class Containers:
    """The containers of a model that was taken apart, with their layers at that time."""

    def __init__(self, model: Any, stages: Mapping[int, nn.Module]) -> None:
        """``model``: an nn.Module that was cut, or a list of stages. ``stages``: those of this process."""
        self._list = model if isinstance(model, nn.ModuleList) and not _runs(model) else None
        self._opened = [] if isinstance(model, (list, tuple)) else list(_opened(model, ""))
        lists: list[tuple[str, nn.Module]] = [] if self._list is None else [("the list of stages", self._list)]
        lists += [(f"stage {i}", stage.layers) for i, stage in stages.items() if isinstance(stage, Slice)]
        self._layers = [
            (name, container._modules, list(container._modules.values()))
            for name, container in (*lists, *self._opened)
        ]

    def check(self) -> None:
        """Raises InvalidArgument if one of them has changed, so that its layers alone are not the model."""
        for name, container in self._opened:
            found = own_code(container)
            if found:
                raise InvalidArgument(
                    f"{name} has got {found} since the model was cut into stages, which would not run; {_AFTER}"
                )
        if self._list is not None and _runs(self._list):
            raise InvalidArgument(
                f"the list of stages has got a forward since the model was cut, which would not run; {_AFTER}"
            )
        for name, modules, layers in self._layers:
            if len(modules) != len(layers) or any(a is not b for a, b in zip(modules.values(), layers)):
                raise InvalidArgument(
                    f"{_changed(name, list(modules.values()), layers)} since the model was cut into stages, "
                    f"which run the layers of before; {_AFTER}"
                )


_AFTER = (
    "make the Pipeline when the model is complete (close() the old one), or change what is inside the layers, "
    "which the stages follow"
)


def _opened(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """The containers, with their names in messages."""
    if only_runs_children(module):
        yield f"{type(module).__name__} {prefix.rstrip('.')!r}" if prefix else "the model", module
        for name, child in module._modules.items():
            if child is not None:
                yield from _opened(child, f"{prefix}{name}.")


def _changed(name: str, now: list[Any], before: list[Any]) -> str:
    if len(now) != len(before):
        return f"{name} has {len(now)} layers in place of {len(before)}"
    at = next(i for i, (a, b) in enumerate(zip(now, before)) if a is not b)
    old, new = type(before[at]).__name__, type(now[at]).__name__
    by = f"{type(now[at]).__module__}.{new}" if new == old and type(now[at]) is not type(before[at]) else new
    return f"in {name} layer {at} was replaced: {old} by {'another' if by == old else f'a {by}'}"
