"""Hooks on parameters that run when a gradient is complete: once in a step, after its last microbatch.

Autograd runs them for each microbatch. An optimizer that steps in such a hook would then move the weights while
other microbatches still need the old ones.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .aliases import check_no_hooks
from .reach import Owners


class ParameterHooks:
    """Runs the post-accumulate-grad hooks of a pipeline's parameters."""

    def __init__(self, owners: Owners, microbatches: int, on_aliases: bool) -> None:
        """``owners`` know the parameters. ``on_aliases``: stages run on aliases of all of them, as on GPUs."""
        self._owners = owners
        self._microbatches = microbatches
        self._on_aliases = on_aliases
        self._warned = False
        self._before: list[tuple[nn.Parameter, Tensor | None, int]] = []

    def check(self) -> None:
        """Raises InvalidArgument for a hook of another kind that would not run."""
        if self._on_aliases:
            check_no_hooks(self._owners.parameters, "stages on a GPU run on aliases of their parameters")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Inside it, a step runs without them."""
        held: list[tuple[dict[int, Any], dict[int, Any]]] = []
        self._before = []
        for parameter in self._owners.parameters:
            hooks = parameter._post_accumulate_grad_hooks
            if hooks:
                held.append((hooks, dict(hooks)))
                self._before.append((parameter, parameter.grad, _version(parameter.grad)))
        self._warn()
        for hooks, _ in held:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, own in held:
                hooks.update(own)

    def run(self) -> None:
        """Runs those of the parameters whose gradient has changed in the step that ``held`` held."""
        for parameter, grad, version in self._before:
            if parameter.grad is not None and (
                parameter.grad is not grad or _version(parameter.grad) != version
            ):
                for hook in list(parameter._post_accumulate_grad_hooks.values()):
                    hook(parameter)
        self._before = []

    def _warn(self) -> None:
        if self._before and self._microbatches > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(self._before)} parameters have post-accumulate-grad hooks: a step runs them once, after "
                f"the last microbatch, not {self._microbatches} times; a hook that counts microbatches must "
                "count steps",
                stacklevel=2,
            )


def _version(grad: Tensor | None) -> int:
    return -1 if grad is None else grad._version
