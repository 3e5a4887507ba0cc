"""Runs of a model that leave no trace in it."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers, its gradients and the random state back. Inside it, gradients begin as None."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            for parameter, grad in grads:
                parameter.grad = grad
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer
                    if not buffer.is_meta:
                        buffer.copy_(before)


def gradients(
    outputs: Sequence[Tensor], grads: Sequence[Tensor], inputs: Sequence[Tensor], *, keeps_graph: bool = False
) -> list[Tensor | None]:
    """The gradients of leaves; for use in ``untouched``.

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
