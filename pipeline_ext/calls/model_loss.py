"""The loss that a model computes itself."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import InvalidArgument


class ModelLoss:
    """A loss function that takes the loss out of the model's output: its ``loss``, or itself if a scalar."""

    def __call__(self, output: Any) -> Tensor:
        loss = found_loss(output)
        if loss is None:
            raise InvalidArgument(no_loss(output))
        return loss


def found_loss(output: Any) -> Tensor | None:
    """The loss in a model's output; None if there is none."""
    if isinstance(output, Tensor):
        return output if output.dim() == 0 and output.is_floating_point() else None
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


def no_loss(output: Any) -> str:
    """Why there is no loss, for error messages."""
    return (
        f"the model's output, a {type(output).__name__}, has no loss: it is no scalar and has no .loss; give "
        "loss_fn=, which is called with the output (and target=), or the labels from which the model computes "
        "its loss in the sample and in step"
    )


def check_sums(kwargs: Mapping[str, Any], weighted: bool) -> None:
    """Raises InvalidArgument where models of transformers return parts of a sum, and means were expected."""
    if weighted and kwargs.get("num_items_in_batch") is not None:
        raise InvalidArgument(
            "with num_items_in_batch a model returns its labels' part of the batch's mean, and such parts must "
            'be added, not averaged; give loss_reduction="sum" to Pipeline'
        )
