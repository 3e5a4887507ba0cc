"""Hooks on parameters that run when a gradient is complete: once in a step, after its last microbatch.

Autograd runs them for each microbatch. An optimizer that steps in such a hook would then move the weights while
other microbatches still need the old ones.
"""

import warnings
from typing import Any

from torch import Tensor, nn

from .reach import Owners


class ParameterHooks:
    """Runs the post-accumulate-grad hooks of a pipeline's parameters."""

    def __init__(self, owners: Owners, microbatches: int) -> None:
        """``owners`` know the parameters."""
        self._owners = owners
        self._microbatches = microbatches
        self._warned = False
        self._before: list[tuple[nn.Parameter, Tensor | None, int]] = []
        self._held: list[tuple[dict[int, Any], dict[int, Any]]] = []  # the hooks of a parameter, and a copy

    def hold(self) -> None:
        """A step runs without them from now on, until ``put_back``."""
        self.put_back()
        held, self._before = [], []
        for parameter in self._owners.parameters:
            hooks = parameter._post_accumulate_grad_hooks
            if hooks:
                held.append((hooks, dict(hooks)))
                self._before.append((parameter, parameter.grad, _version(parameter.grad)))
        self._warn()
        self._held = held
        for hooks, _ in held:
            hooks.clear()

    def put_back(self) -> None:
        """Parameters have their hooks again. After Ctrl-C at any moment it can be called again."""
        for hooks, own in self._held:
            hooks.update(own)
        self._held = []

    def run(self) -> None:
        """Runs those of the parameters whose gradient has changed in the step since ``hold``."""
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
