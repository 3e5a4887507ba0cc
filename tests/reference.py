"""The reference every gradient is held against: plain autograd, microbatch by microbatch."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def split(value: Any, microbatches: int) -> list[Any]:
    """A pytree of tensors cut along dimension 0, leaf by leaf."""
    flat, spec = pytree.tree_flatten(value)
    rows = zip(*(leaf.tensor_split(microbatches) for leaf in flat))
    return [pytree.tree_unflatten(list(row), spec) for row in rows]


def reference_step(
    model: nn.Module,
    x: Any,
    y: Any,
    microbatches: int,
    loss_fn: Callable[..., Tensor],
    reduction: str = "mean",
) -> Tensor:
    """Accumulates gradients as DESIGN's reference does; returns the total loss."""
    size = len(pytree.tree_leaves(x)[0])
    total = 0
    for a, b in zip(split(x, microbatches), split(y, microbatches)):
        weight = len(pytree.tree_leaves(a)[0]) / size if reduction == "mean" else 1
        loss = loss_fn(model(a), b) * weight
        loss.backward()
        total = total + loss.detach()
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of all gradients, by parameter name."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(model: nn.Module, expected: dict[str, Tensor | None]) -> None:
    """Bitwise equality, None included."""
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None, f"{name} has a gradient where the reference has none"
        else:
            assert p.grad is not None, f"{name} has no gradient"
            assert torch.equal(p.grad, expected[name]), f"{name} differs from the reference"


def assert_close_gradients(model: nn.Module, expected: dict[str, Tensor | None]) -> None:
    """Compares gradients within the rounding of float32 sums."""
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same parameters and no gradients."""
    copied = copy.deepcopy(model)
    for p in copied.parameters():
        p.grad = None
    return copied
