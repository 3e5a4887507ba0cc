"""The loss that a step returns."""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import PipelineError


def step_loss(loss: Tensor) -> Tensor:
    """The loss as a tensor that says what to leave out if it is asked for a backward."""
    return loss.as_subclass(_StepLoss) if type(loss) is Tensor else loss


class _StepLoss(Tensor):
    """What is computed from it is a plain tensor.

    But Accelerate divides a loss, and gradient scalers multiply it, before they call its backward.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def backward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise PipelineError(
            "step has run the backward already, and the gradients are in .grad; leave out loss.backward() or "
            "accelerator.backward(loss), give a gradient scaler to Pipeline as scaler=, and accumulate "
            "gradients by several steps between two of the optimizer"
        )

    def __mul__(self, other: Any) -> Tensor:
        return step_loss(super().__mul__(other))

    def __truediv__(self, other: Any) -> Tensor:
        return step_loss(super().__truediv__(other))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.as_subclass(Tensor))

    def __format__(self, format_spec: str) -> str:
        return format(self.as_subclass(Tensor), format_spec)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)
