"""What may be given to a pipeline, and what is said about anything else."""

import math
import operator
from typing import Any

import torch

from .boundary import differentiable
from .errors import InvalidArgument


def count(name: str, value: Any) -> int:
    """``value`` as a whole number of at least 1; raises InvalidArgument."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number < 2**31:
        raise InvalidArgument(f"{name} is {value!r}; give a whole number of at least 1")
    return number


def check_settings(loss_fn: Any, loss_reduction: Any, timeout: Any) -> None:
    """Raises InvalidArgument for settings of a pipeline that cannot be used."""
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidArgument(
            f"loss_fn is {loss_fn!r}; give a function of output and target that returns a scalar"
        )
    if isinstance(loss_fn, type):
        name = loss_fn.__name__
        raise InvalidArgument(f"loss_fn is the class {name}; give an instance, {name}()")
    if loss_reduction not in ("mean", "sum"):
        raise InvalidArgument(f'loss_reduction is {loss_reduction!r}; it is "mean" or "sum"')
    if not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
        raise InvalidArgument(f"timeout is {timeout!r}; give a positive number of seconds")


def check_trains(has_loss: bool, losses: Any, target: Any) -> None:
    """Raises InvalidArgument where a step could not train."""
    if not has_loss:
        raise InvalidArgument(
            "step needs a loss: give loss_fn= to Pipeline, as in "
            "Pipeline(..., loss_fn=torch.nn.functional.cross_entropy); eval() needs none"
        )
    if not torch.is_grad_enabled():
        raise InvalidArgument(
            "step computes gradients, but was called where they are off (torch.no_grad or "
            "inference_mode); call it outside, or use eval()"
        )
    if losses is not None and not isinstance(losses, list):
        raise InvalidArgument(f"losses is a {type(losses).__name__}; give a list, to be filled")
    if differentiable(target):
        raise InvalidArgument(
            "target requires a gradient, and step gives none to targets; detach it, or make it an "
            "input of the model"
        )


def check_rows(rows: int, microbatches: int) -> None:
    """Raises InvalidArgument for a batch too small to cut."""
    if rows == 0:
        raise InvalidArgument("the batch has no rows")
    if rows < microbatches:
        raise InvalidArgument(
            f"the batch has {rows} rows, too few for {microbatches} microbatches; give a larger batch, leave a "
            f"short last one out (DataLoader(..., drop_last=True)), or Pipeline(..., microbatches={rows})"
        )
