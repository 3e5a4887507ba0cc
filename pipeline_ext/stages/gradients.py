"""Adding to a gradient that may be sparse."""

import torch
from torch import Tensor


def total(before: Tensor, grad: Tensor) -> Tensor:
    """``before + grad``, in new memory. torch adds a sparse tensor to a dense one, but not the reverse."""
    return grad + before if before.is_sparse and not grad.is_sparse else before + grad


def add_gradient(leaf: Tensor, grad: Tensor) -> None:
    """Adds ``grad`` to ``leaf.grad`` as autograd does: in place if torch can. ``grad`` itself may be kept."""
    with torch.no_grad():
        if leaf.grad is None:
            leaf.grad = grad
        elif leaf.grad.is_sparse and not grad.is_sparse:
            leaf.grad = total(leaf.grad, grad)
        else:
            leaf.grad += grad
