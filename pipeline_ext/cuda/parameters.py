"""Parameters as the lanes see them.

Autograd ties each parameter's accumulation to the one stream on which the parameter was first used, and makes
that stream wait for the gradients of all others: lanes would wait for one another. So each lane runs on aliases
of the parameters, which have the same memory and a ``.grad`` of their own; after each backward that is added to
the parameter's, in the order of the plan.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..stage import Stage

Target = Callable[[int, nn.Parameter], nn.Parameter]


class _Place(NamedTuple):
    """Where a module holds a parameter."""

    held: dict[str, Tensor | None]
    name: str
    parameter: nn.Parameter


class LaneParameters:
    """The aliases of all stages' parameters, by lane.

    Hooks on a parameter are not called: gradients are added to it outside of autograd.
    """

    def __init__(self, stages: Sequence[Stage], target: Target) -> None:
        """``target(stage, parameter)`` says what a stage's gradients of a parameter are added to."""
        self._stages = stages
        self._target = target
        self._places: list[list[_Place]] = [[] for _ in stages]
        self._aliases: dict[tuple[int, int], list[nn.Parameter]] = {}  # by stage and lane
        self._looks: list[tuple] = []

    def begin(self) -> None:
        """Prepares for a step: what has been replaced since the last gets new aliases."""
        looks = [
            (id(place.held.get(place.name)), place.parameter.data_ptr(), place.parameter.requires_grad)
            for places in self._places
            for place in places
        ]
        if looks and looks == self._looks:
            return
        self._places = [
            [
                _Place(owner._parameters, name, parameter)
                for module in stage.modules()
                for owner in module.modules()
                for name, parameter in owner._parameters.items()
                if parameter is not None
            ]
            for stage in self._stages
        ]
        self._looks = [
            (id(place.parameter), place.parameter.data_ptr(), place.parameter.requires_grad)
            for places in self._places
            for place in places
        ]
        self._aliases = {}

    def enter(self, stage: int, lane: int) -> None:
        """From now on the stage's modules hold the lane's aliases."""
        for (held, name, _), alias in zip(self._places[stage], self._aliases_of(stage, lane)):
            held[name] = alias

    def leave(self, stage: int) -> None:
        """They hold the parameters again."""
        for held, name, parameter in self._places[stage]:
            held[name] = parameter

    def collect(self, stage: int, lane: int) -> None:
        """Adds what a backward has left in the lane's aliases to the parameters' gradients."""
        sums, grads = [], []
        for place, alias in zip(self._places[stage], self._aliases_of(stage, lane)):
            grad = alias.grad
            if grad is None:
                continue
            alias.grad = None
            target = self._target(stage, place.parameter)
            if target.grad is None:
                target.grad = grad
            elif target.grad.is_sparse or grad.is_sparse:
                target.grad = target.grad + grad
            else:
                sums.append(target.grad)
                grads.append(grad)
        if sums:
            with torch.no_grad():
                torch._foreach_add_(sums, grads)

    def forget(self) -> None:
        """What a backward that failed has left behind."""
        for aliases in self._aliases.values():
            for alias in aliases:
                alias.grad = None

    def _aliases_of(self, stage: int, lane: int) -> list[nn.Parameter]:
        aliases = self._aliases.get((stage, lane))
        if aliases is None:
            made = {}  # a parameter that several modules of the stage hold has one alias
            for place in self._places[stage]:
                parameter = place.parameter
                if parameter not in made:
                    made[parameter] = nn.Parameter(parameter.detach(), parameter.requires_grad)
            aliases = [made[place.parameter] for place in self._places[stage]]
            self._aliases[stage, lane] = aliases
        return aliases
