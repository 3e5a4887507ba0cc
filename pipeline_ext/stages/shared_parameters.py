"""Parameters that several stages hold.

Two threads' backwards must not add to one ``.grad``, and the sum must not depend on which came first. So each
stage that holds such a parameter runs forward on an alias of it, which has the same memory and a ``.grad`` of
its own; when the step has ended these are added up in the order of the stages.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

from torch import nn

Body = Callable[[int], None]


class _Place(NamedTuple):
    """Where a module holds a parameter."""

    owner: nn.Module
    name: str
    parameter: nn.Parameter

    def put(self, parameter: nn.Parameter) -> None:
        self.owner._parameters[self.name] = parameter


class SharedParameters:
    """The parameters that several stages hold, of the modules given, by stage.

    Hooks on such a parameter are not called in a step. Stages that hold one and the same module with such a
    parameter take turns in their forwards.
    """

    def __init__(self, by_stage: Mapping[int, Sequence[nn.Module]]) -> None:
        self._by_stage = by_stage
        self._turns = threading.Lock()
        self._aliases: dict[nn.Parameter, dict[int, nn.Parameter]] = {}
        self._find()

    def _find(self) -> None:
        stages: dict[nn.Parameter, set[int]] = {}
        places: dict[int, dict[tuple[nn.Module, str], _Place]] = {}
        for stage, modules in self._by_stage.items():
            places[stage] = {}
            for owner in (m for module in modules for m in module.modules()):
                for name, parameter in owner._parameters.items():
                    if parameter is not None:
                        places[stage][owner, name] = _Place(owner, name, parameter)
                        stages.setdefault(parameter, set()).add(stage)
        self._places = {
            stage: [place for place in found.values() if len(stages[place.parameter]) > 1]
            for stage, found in places.items()
        }
        self._holders = {p: sorted(held) for p, held in stages.items() if len(held) > 1}
        owners = {stage: {place.owner for place in found} for stage, found in self._places.items()}
        self._take_turns = {
            stage: any(mine & others for other, others in owners.items() if other != stage)
            for stage, mine in owners.items()
        }

    def parameters(self) -> Collection[nn.Parameter]:
        """The parameters that several stages hold."""
        return self._holders.keys()

    def target(self, stage: int, parameter: nn.Parameter) -> nn.Parameter:
        """What a stage's gradients of one of its parameters are to be added to in this step."""
        return self._aliases.get(parameter, {}).get(stage, parameter)

    def watch(self, stage: int, forward: Body) -> Body:
        """``forward`` of a stage, on its aliases."""

        def watched(m: int) -> None:
            if not self._places[stage]:
                forward(m)
            elif self._take_turns[stage]:
                with self._turns:
                    self._run_on_aliases(stage, forward, m)
            else:
                self._run_on_aliases(stage, forward, m)

        return watched

    def _run_on_aliases(self, stage: int, forward: Body, m: int) -> None:
        for place in self._places[stage]:
            place.put(self._aliases[place.parameter][stage])
        try:
            forward(m)
        finally:
            self._restore(stage)

    def _restore(self, stage: int) -> None:
        for place in self._places[stage]:
            place.put(place.parameter)

    def begin(self) -> None:
        """Makes the aliases of one step."""
        if any(
            place.owner._parameters.get(place.name) is not place.parameter
            for found in self._places.values()
            for place in found
        ):
            self._find()
        self._aliases = {
            parameter: {
                stage: nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
                for stage in stages
            }
            for parameter, stages in self._holders.items()
        }

    def end(self) -> None:
        """Adds each stage's gradients to those of the parameters."""
        for parameter, aliases in self._aliases.items():
            for alias in aliases.values():
                if alias.grad is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = alias.grad
                elif parameter.grad.is_sparse:
                    parameter.grad = alias.grad + parameter.grad
                else:
                    parameter.grad.add_(alias.grad)
        self._aliases = {}

    def give_up(self) -> None:
        """Puts the parameters back where a stage that never returns has left its aliases."""
        for stage in self._places:
            self._restore(stage)
