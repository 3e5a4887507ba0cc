"""Runs of modules that leave no trace in them."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..base.undone import undone


@contextlib.contextmanager
def untouched(*roots: nn.Module) -> Iterator[None]:
    """Puts their buffers, gradients and the random state back. Inside it, gradients begin as None."""
    modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    grads = [(p, p.grad) for p in dict.fromkeys(p for root in roots for p in root.parameters())]
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[i] for i in {p.device.index for p, _ in grads if p.is_cuda}]
    states = [(generator, generator.get_state()) for generator in generators]

    def put_back() -> None:
        for parameter, grad in grads:
            parameter.grad = grad
        for generator, state in states:
            generator.set_state(state)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                module._buffers[name] = buffer
                if not buffer.is_meta:
                    buffer.copy_(before)

    with undone(put_back):
        for parameter, _ in grads:
            parameter.grad = None
        yield
