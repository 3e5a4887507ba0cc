"""What the means in a loss are over, as autograd's graph tells it."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import InvalidArgument

_MEAN, _SUM = 1, 2  # torch's numbers for reduction="mean" and "sum"
_KEEPS = re.compile(r"(Add|Sub|Neg|Alias|View|UnsafeView|Clone|ToCopy|Squeeze|Reshape)\w*Backward\d*")
_SCALES = re.compile(r"(Mul|Div)Backward\d")
_DEEPEST = 16  # nodes from the loss to a mean in it
_ALIKE = 1e-5  # relative: a sum of weights is rounded


class Mean(NamedTuple):
    """A mean that is a term of a loss, or a sum that is divided.

    Attributes:
        over: a number of elements, the sum of the labels' weights, or what divides the sum; maybe on a GPU.
        factor: by which the loss multiplies it.
        left_out: the label that it leaves out, if it is one of labels.
    """

    over: "float | Tensor"
    factor: float
    left_out: int | None = None


def check_no_sum(loss: Tensor) -> None:
    """Raises InvalidArgument for just what a loss function of torch with ``reduction="sum"`` returns."""
    if _reduces_by(loss.grad_fn) == _SUM:
        raise InvalidArgument(
            'loss_fn returns a sum (reduction="sum"), which loss_reduction="mean" would weigh by the '
            'microbatch\'s share of the rows; give Pipeline loss_reduction="sum", or loss_fn reduction="mean"'
        )


def means_in(loss: Tensor) -> list[Mean]:
    """The means that add up to the loss; none of those that the graph does not show for certain."""
    return [] if loss.grad_fn is None else list(_means(loss.grad_fn, 1.0, _DEEPEST))


def _means(node: Any, factor: float, deepest: int) -> Iterator[Mean]:
    followed = [edge for edge in node.next_functions if edge[0] is not None]
    name = node.name()
    if name == "MeanBackward0":
        yield Mean(node._saved_self_sym_numel, factor)
    elif (reduction := _reduces_by(node)) is not None:
        if reduction == _MEAN:
            yield Mean(_averaged_over(node, followed), factor, _left_out(node))
    elif deepest and all(_shape(*edge) == () for edge in followed):
        if _KEEPS.fullmatch(name):
            for child, _ in followed:
                yield from _means(child, factor, deepest - 1)
        elif _SCALES.fullmatch(name) and len(followed) == 1 and (by := _scalar(node)) is not None:
            ((child, _),) = followed
            divides = name.startswith("Div")
            if divides and (child.name().startswith("SumBackward") or _reduces_by(child) == _SUM):
                yield Mean(by, factor, _left_out(child))
            elif not isinstance(by, Tensor):
                yield from _means(child, factor / by if divides and by else factor * by, deepest - 1)


def _reduces_by(node: Any) -> int | None:
    """The reduction of one of torch's loss functions."""
    return getattr(node, "_saved_reduction", None)


def _averaged_over(node: Any, followed: Sequence[Any]) -> "float | Tensor":
    # Read once: a tensor that is saved under checkpointing is computed anew by each reading.
    total = getattr(node, "_saved_total_weight", None)
    if total is None:
        return math.prod(_shape(*followed[0]))
    return total.item() if total.device.type == "cpu" else total.detach()


def _left_out(node: Any) -> int | None:
    label = getattr(node, "_saved_ignore_index", None)
    # torch shows it as an unsigned number of 64 bits.
    return label - 2**64 if label is not None and label >= 2**63 else label


def _shape(node: Any, output: int) -> tuple[int, ...]:
    return tuple(node._input_metadata[output].shape)


def _scalar(node: Any) -> "float | Tensor | None":
    """The number by which a node multiplies or divides the only tensor that has a graph; on a GPU a tensor."""
    other = getattr(node, "_saved_other", None)
    if other is None:
        other = getattr(node, "_saved_self", None)
    if isinstance(other, Tensor):
        if other.dim() > 0 or other.is_complex():
            return None
        return other.item() if other.device.type == "cpu" else other.detach()
    return other if isinstance(other, (int, float)) else None


def check_over_rows(by_microbatch: Sequence[Sequence[Mean]], rows: Sequence[float], synchronizes: bool) -> None:
    """Raises InvalidArgument for a mean that is over different numbers in microbatches, for their rows.

    A mean that is over as much in each microbatch, as one over a weight, is left alone, unless it is one of
    labels. Unless it ``synchronizes``, counts on GPUs are not looked at.
    """
    if len({len(means) for means in by_microbatch}) != 1:
        return
    for means in zip(*by_microbatch):
        if not synchronizes and any(isinstance(mean.over, Tensor) for mean in means):
            continue
        counts = [float(mean.over) for mean in means]
        shares = [count / n for count, n in zip(counts, rows)]
        left_out = means[0].left_out
        constant = left_out is None and _alike(counts)
        if constant or _alike(shares) or len({mean.factor for mean in means}) > 1:
            continue
        low, high = shares.index(min(shares)), shares.index(max(shares))
        label = -100 if left_out is None else left_out
        raise InvalidArgument(
            f"a mean in the loss is over {counts[low]:g} in microbatch {low} and over {counts[high]:g} in "
            f"microbatch {high}, which is not by their rows: it leaves some out, or weighs them; the mean of "
            "the microbatches' means would not be the mean over the batch. Give Pipeline loss_weight=, a "
            "function of a microbatch's target that returns what the mean is over "
            f"(pipeline_ext.count_not({label}) for labels that are left out; lambda target: "
            'weight[target].sum() for weights of classes), or loss_weight="rows" to weigh by rows all the same'
        )


def _alike(numbers: Sequence[float]) -> bool:
    return math.isclose(min(numbers), max(numbers), rel_tol=_ALIKE)
