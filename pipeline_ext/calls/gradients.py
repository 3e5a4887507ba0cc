"""Gradients of leaves, for runs in ``untouched``."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor], *, keeps_graph: bool = False
) -> list[Tensor | None]:
    """The gradients of leaves; their own ``.grad`` is None before and after.

    By ``backward``, since reentrant checkpoints refuse ``torch.autograd.grad``; but not if hooks wait for
    gradients that are accumulated.
    """
    if any(leaf._post_accumulate_grad_hooks for leaf in inputs):
        return list(torch.autograd.grad(outputs, inputs, grads, keeps_graph, allow_unused=True))
    for leaf in inputs:
        leaf.grad = None
    torch.autograd.backward(outputs, grads, keeps_graph)
    found = [leaf.grad for leaf in inputs]
    for leaf in inputs:
        leaf.grad = None
    return found
