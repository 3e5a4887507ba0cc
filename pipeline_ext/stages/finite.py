"""Where values that are not finite first appear in a step."""

import cmath
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..base.tensors import dense_parts

RESULT, LOSS, GRADIENT = range(3)  # what a stage makes of a microbatch: sent on, added to the loss, sent back


class Watch:
    """The values that the stages of this process make in one step, by stage and microbatch.

    On a GPU nothing waits for the values before they are asked for.
    """

    def __init__(self, num_stages: int, microbatches: int) -> None:
        # By kind, stage and microbatch; written by the task that makes the value.
        self._finite: list[list[list[Tensor | bool]]] = [
            [[True] * microbatches for _ in range(num_stages)] for _ in (RESULT, LOSS, GRADIENT)
        ]

    def look(self, kind: int, stage: int, m: int, tensors: Iterable[Tensor | None]) -> None:
        """Takes what ``stage`` has made of microbatch ``m``."""
        self._finite[kind][stage][m] = are_finite(tensors)

    def first(self, kind: int, stage: int) -> int | None:
        """The first microbatch whose value of this kind is not finite."""
        return next((m for m, finite in enumerate(self._finite[kind][stage]) if not finite), None)


def are_finite(tensors: Iterable[Tensor | None]) -> Tensor | bool:
    """Whether all elements are; what is on a GPU decides it there."""
    parts = list(_floating(tensor for tensor in tensors if tensor is not None))
    on_devices = [part.isfinite().all() for part in parts if part.device.type != "cpu"]
    on_host = all(_is_finite(part) for part in parts if part.device.type == "cpu")
    return torch.stack(on_devices).all() if on_devices and on_host else on_host


def _is_finite(tensor: Tensor) -> bool:
    # One quick pass: a sum with an element that is not finite is not. Only one that overflows takes another.
    return cmath.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _floating(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    for part in itertools.chain.from_iterable(map(dense_parts, tensors)):
        if part.is_floating_point() or part.is_complex():
            part = part.detach()
            yield part.float() if part.itemsize == 1 else part  # float8 has no sums
