"""How the loss of a batch follows from the losses of its microbatches.

A model may return a mean over rows, over labels, or over labels without each row's first, or divide by
``num_items_in_batch``, which not every model does that accepts it. Where these differ, a measurement decides.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import PipelineError

_IGNORED = -100  # labels that losses of transformers leave out
_CLOSE = 1e-3

Rules = Mapping[str, list[float]]  # a weight for each microbatch


def sizes(rows: int, count: int) -> list[int]:
    """The rows of each microbatch, as ``torch.tensor_split`` cuts."""
    return [rows // count + (m < rows % count) for m in range(count)]


def rules(labels: Any, rows: int, count: int, *, divided: bool) -> Rules:
    """The weights by which microbatches may add up. ``divided``: the model is given ``num_items_in_batch``."""
    found = {"num_items_in_batch": [1 / count] * count} if divided else {}
    found["rows"] = [n / rows for n in sizes(rows, count)]
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.dim() > 0:
        counts = labels != _IGNORED
        found |= _by_count("labels", counts, rows, count)
        if labels.dim() > 1:
            found |= _by_count("labels after the first", counts[..., 1:], rows, count)
    return found


def _by_count(name: str, counts: Tensor, rows: int, count: int) -> dict[str, list[float]]:
    of_each = [int(part.sum()) for part in counts.split(sizes(rows, count))]
    return {name: [n / sum(of_each) for n in of_each]} if any(of_each) else {}


def differ(candidates: Rules) -> bool:
    """Whether it matters which of them holds."""
    first, *others = candidates.values()
    return any(not math.isclose(a, b, rel_tol=1e-9) for other in others for a, b in zip(first, other))


def fitting(candidates: Rules, losses: Sequence[float], whole: float) -> str:
    """The rule by which the microbatches' losses add up to that of the whole batch.

    Raises PipelineError if none does.
    """

    def error(name: str) -> float:
        total = sum(w * loss for w, loss in zip(candidates[name], losses) if w)
        return abs(total - whole) / max(abs(whole), 1e-6)

    best = min(candidates, key=error)
    if not error(best) <= _CLOSE:  # nan, too
        raise PipelineError(
            f"the loss of the first batch is {whole:.6g}, and no mean of its microbatches' losses "
            f"({', '.join(f'{loss:.6g}' for loss in losses)}) by {' or '.join(candidates)} gives that; give "
            "compute_loss_func= to the trainer, a loss that is a mean over rows or labels, or microbatches=1"
        )
    return best
