"""Parameters as the lanes see them.

Autograd ties each parameter's accumulation to the one stream on which the parameter was first used, and makes
that stream wait for the gradients of all others: lanes would wait for one another. So each lane runs on aliases
of the parameters, which have the same memory and a ``.grad`` of their own. A backward leaves its gradients
there, and they are added to the parameters', in the order of the plan.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...model.module_watch import ModuleWatch
from ...stages.stage import Stage

Target = Callable[[int, nn.Parameter], nn.Parameter]


_LARGE = 64 * 2**20  # bytes of a stage's parameters


class _Place(NamedTuple):
    """Where a module holds a parameter."""

    held: dict[str, Tensor | None]
    name: str
    parameter: nn.Parameter


class _Flat(NamedTuple):
    """A recurrent layer, which holds its weights in a list too, and moves them all where that has changed."""

    layer: nn.RNNBase
    weights: list[nn.Parameter]


class LaneParameters:
    """The aliases of all stages' parameters, by lane.

    Hooks on a parameter are not called: gradients are added to it outside of autograd.
    """

    def __init__(self, stages: Sequence[Stage], target: Target) -> None:
        """``target(stage, parameter)`` says what a stage's gradients of a parameter are added to."""
        self._stages = stages
        self._target = target
        self._places: dict[int, list[_Place]] = {}  # by stage, as what follows
        self._flat: dict[int, list[_Flat]] = {}
        self._large: dict[int, bool] = {}
        self._watch = ModuleWatch(module for stage in stages for module in stage.modules())
        self._looks: list[tuple] | None = None
        self._aliases: dict[tuple[int, int], dict[nn.Parameter, nn.Parameter]] = {}  # by stage and lane
        self._replaced: list[Tensor] = []  # gradients that other lanes may still read

    def begin(self) -> None:
        """Prepares for a step: what has been replaced since the last gets new aliases."""
        replaced = self._watch.changed()
        if self._looks is not None and not replaced and self._look() == self._looks:
            return
        owners = {
            stage.index: [owner for module in stage.modules() for owner in module.modules()]
            for stage in self._stages
        }
        self._places = {
            index: [
                _Place(owner._parameters, name, parameter)
                for owner in of_stage
                for name, parameter in owner._parameters.items()
                if parameter is not None
            ]
            for index, of_stage in owners.items()
        }
        self._flat = {
            index: [
                _Flat(owner, list(owner._flat_weights)) for owner in of_stage if isinstance(owner, nn.RNNBase)
            ]
            for index, of_stage in owners.items()
        }
        self._large = {
            index: sum(p.numel() * p.itemsize for p in {place.parameter for place in places}) > _LARGE
            for index, places in self._places.items()
        }
        self._aliases = {}
        self._looks = self._look()

    def enter(self, stage: int, lane: int) -> None:
        """From now on the stage's modules hold the lane's aliases."""
        aliases = self._aliases_of(stage, lane)
        for held, name, parameter in self._places[stage]:
            held[name] = aliases[parameter]
        for layer, weights in self._flat[stage]:
            _hold_flat(layer, [aliases.get(weight, weight) for weight in weights])

    def leave(self, stage: int) -> None:
        """They hold the parameters again."""
        for held, name, parameter in self._places[stage]:
            held[name] = parameter
        for layer, weights in self._flat[stage]:
            _hold_flat(layer, weights)

    def before_backward(self, stage: int, lane: int) -> None:
        """Where gradients are large the next ones are added to them at once, and are never all there."""
        if not self._large[stage]:
            return
        for parameter, alias in self._aliases_of(stage, lane).items():
            grad = self._target(stage, parameter).grad
            if grad is not None and not grad.is_sparse:
                alias.grad = grad

    def after_backward(self, stage: int, lane: int) -> None:
        """Adds what it has left in the lane's aliases to the parameters' gradients."""
        sums, grads = [], []
        for parameter, alias in self._aliases_of(stage, lane).items():
            grad = alias.grad
            if grad is None:
                continue
            alias.grad = None
            target = self._target(stage, parameter)
            before = target.grad
            if before is None:
                target.grad = grad
            elif before.is_sparse or grad.is_sparse:
                self._replaced.append(before)
                target.grad = before + grad if grad.is_sparse else grad + before
            elif before is not grad:
                sums.append(before)
                grads.append(grad)
        if sums:
            with torch.no_grad():
                torch._foreach_add_(sums, grads)

    def end(self) -> None:
        """The caller's streams follow all others."""
        self._replaced.clear()

    def forget(self) -> None:
        """What a backward that failed has left behind."""
        for aliases in self._aliases.values():
            for alias in aliases.values():
                alias.grad = None

    def _look(self) -> list[tuple]:
        return [
            (parameter.data_ptr(), parameter.requires_grad)
            for places in self._places.values()
            for _, _, parameter in places
        ]

    def _aliases_of(self, stage: int, lane: int) -> dict[nn.Parameter, nn.Parameter]:
        aliases = self._aliases.get((stage, lane))
        if aliases is None:
            aliases = {
                parameter: nn.Parameter(parameter.detach(), parameter.requires_grad)
                for _, _, parameter in self._places[stage]
            }
            self._aliases[stage, lane] = aliases
        return aliases


def _hold_flat(layer: nn.RNNBase, weights: list[nn.Parameter]) -> None:
    layer._flat_weights = weights
    layer._flat_weight_refs = [weakref.ref(weight) for weight in weights]
