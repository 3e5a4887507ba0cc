"""The state of the unsplit model and of its optimizer, of which each process may have a part."""

from collections.abc import Sequence
from typing import Any

import torch

from ..pipeline import Pipeline
from .team import Team


class UnsplitState:
    """Of a model all of whose state are its parameters, and an optimizer that has them in one group.

    In the optimizer's state a parameter is a number, which is its place in the unsplit model.
    """

    def __init__(
        self, pipe: Pipeline, optimizer: torch.optim.Optimizer, names: Sequence[str], team: Team
    ) -> None:
        """``names`` are the unsplit model's; the optimizer is of ``pipe.parameters()``."""
        self._pipe = pipe
        self._optimizer = optimizer
        self._names = names
        self._team = team
        self._places = [names.index(name) for name, _ in pipe.named_parameters()]  # of those that are here

    def gather(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The model's state and the optimizer's, in the first process; None in the others."""
        packed = self._optimizer.state_dict()
        (group,) = packed["param_groups"]
        kept = {self._places[number]: of_one for number, of_one in packed["state"].items()}
        parts = self._team.gather((self._pipe.state_dict(), kept))
        if parts is None:
            return None
        model = {name: tensor for state, _ in parts for name, tensor in state.items()}
        state = {place: of_one for _, kept in parts for place, of_one in kept.items()}
        return (
            {name: model[name] for name in self._names},
            {"state": state, "param_groups": [group | {"params": list(range(len(self._names)))}]},
        )

    def load(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Takes over the part of this process.

        Raises RuntimeError, ValueError, KeyError or TypeError for what does not fit.
        """
        self._pipe.load_state_dict(model)
        (group,) = optimizer["param_groups"]
        if len(group["params"]) != len(self._names):
            raise ValueError(f"the optimizer's state is of {len(group['params'])} parameters")
        state = optimizer["state"]
        self._optimizer.load_state_dict(
            {
                "state": {n: state[place] for n, place in enumerate(self._places) if place in state},
                "param_groups": [group | {"params": list(range(len(self._places)))}],
            }
        )
