"""How long the calls of a program take."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..microbatches.cutting import Arguments
from .gradients import gradients
from .program import Program
from .routing import Call, running
from .values import copied


def times(program: Program, arguments: Arguments, repeats: int = 2) -> list[float]:
    """Seconds of forward and backward of each call; the last includes the code after it.

    For use in ``untouched``.
    """
    runs = []
    for _ in range(repeats):
        run = _Timed(program)
        args, kwargs = copied(arguments)
        with torch.enable_grad(), running(run):
            program.model(*args, **kwargs)
        run.seconds[-1] += 3 * (time.perf_counter() - run.ended)  # a backward takes about two forwards
        runs.append(run.seconds)
    return [min(of_call) for of_call in zip(*runs)]


def sizes(program: Program) -> list[float]:
    """The parameters of each call, each counted where it is used first."""
    seen: set[Tensor] = set()
    counts = []
    for call in program.calls:
        new = [p for p in call.unit.parameters() if p not in seen]
        seen.update(new)
        counts.append(sum(p.numel() for p in new) + 1.0 / len(program.calls))
    return counts


class _Timed:
    """A run that computes each call, and its backward at once."""

    def __init__(self, program: Program) -> None:
        self._units = program.units
        self._inside = False
        self.seconds: list[float] = []
        self.ended = 0.0

    def call(self, unit: nn.Module, compute: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._inside or unit not in self._units:
            return compute(*args, **kwargs)
        self._inside = True
        # Lists and dicts stay the objects that they are: the unit may write to them.
        args = tuple(map(_entering, args))
        kwargs = {name: _entering(value) for name, value in kwargs.items()}
        begin = time.perf_counter()
        try:
            value = compute(*args, **kwargs)
        finally:
            self._inside = False
        results = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.requires_grad]
        inputs = [p for p in unit.parameters() if p.requires_grad]
        if results:
            # What the unit left in a dict for later ones leads back here.
            gradients(results, [torch.ones_like(t) for t in results], inputs, keeps_graph=True)
        self.ended = time.perf_counter()
        self.seconds.append(self.ended - begin)
        return pytree.tree_map_only(Tensor, Tensor.detach, value)


def _entering(value: Any) -> Any:
    is_cut = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_().clone() if is_cut else value
