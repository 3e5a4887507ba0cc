"""How much each microbatch counts in a mean that is not over rows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument

LossWeight = Callable[[Any], "float | Tensor"]
ROWS = "rows"

_IGNORED = -100  # the labels that torch's cross_entropy leaves out unless it is told otherwise


def count_not(value: float) -> LossWeight:
    """Counts the elements of a microbatch's target that are not ``value``, as ``loss_weight`` of ``Pipeline``.

    The target is a tensor, or a pytree with one. Raises InvalidArgument for any other when it is called.
    """

    def count(target: Any) -> Tensor:
        tensors = [leaf for leaf in pytree.tree_leaves(target) if isinstance(leaf, Tensor)]
        if len(tensors) != 1:
            raise InvalidArgument(
                f"count_not({value}) counts in a target that is a tensor, or holds one; this one holds "
                f"{len(tensors)}: give a function of your own as loss_weight="
            )
        return (tensors[0] != value).sum()

    return count


def check_unmasked(targets: Sequence[Any], synchronizes: bool) -> None:
    """Raises InvalidArgument for labels of -100 of which microbatches have different numbers.

    The mean of their means is then not the mean over all labels, and nan if one microbatch has no others.
    Unless it ``synchronizes``, labels on GPUs are not looked at: that waits for the GPU, and ends a capture.
    """
    labels = [leaf for leaf in pytree.tree_leaves(targets[0]) if _has_labels(leaf)]
    if not labels or not (synchronizes or all(leaf.device.type == "cpu" for leaf in labels)):
        return
    counted = [
        tuple(
            int((leaf != _IGNORED).sum()) / max(1, leaf.shape[0])
            for leaf in pytree.tree_leaves(target)
            if _has_labels(leaf)
        )
        for target in targets
    ]
    if len(set(counted)) > 1:
        raise InvalidArgument(
            f"target has labels of {_IGNORED}, which losses leave out, and microbatches have different numbers "
            "of others, so the mean of their means would not be the mean over all labels; give "
            f"loss_weight=pipeline_ext.count_not({_IGNORED}) to Pipeline, or another function that counts what "
            "the loss is a mean over (a causal language model of transformers leaves out each row's first "
            f"label: lambda labels: pipeline_ext.count_not({_IGNORED})(labels[:, 1:])), or "
            f'loss_weight="{ROWS}" to weigh by rows all the same'
        )


def _has_labels(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.int64 and leaf.dim() > 0 and not leaf.is_nested


def counts(loss_weight: LossWeight, targets: Sequence[Any]) -> list[float]:
    """What each microbatch counts. Raises InvalidArgument for anything but numbers of at least 0."""
    found = []
    for m, target in enumerate(targets):
        count = loss_weight(target)
        try:
            number = float(count)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise InvalidArgument(
                f"loss_weight returned {count!r} for microbatch {m}; it must return a number of at least 0: "
                "what the mean that loss_fn returns is over"
            )
        found.append(number)
    return found
