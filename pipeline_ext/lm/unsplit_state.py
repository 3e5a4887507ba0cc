"""The state of the unsplit model and its optimizer, gathered from the processes that hold parts of it."""

from collections.abc import Sequence
from typing import Any

import torch

from ..pipeline import Pipeline
from .team import Team


class UnsplitState:
    """For a model without buffers, and an optimizer with one parameter group.

    The optimizer's state is keyed by the parameter's position in the unsplit model.
    """

    def __init__(
        self, pipe: Pipeline, optimizer: torch.optim.Optimizer, names: Sequence[str], team: Team
    ) -> None:
        """``names`` are the unsplit model's parameter names; the optimizer holds ``pipe.parameters()``."""
        self._pipe = pipe
        self._optimizer = optimizer
        self._names = names
        self._team = team
        self._positions = [names.index(name) for name, _ in pipe.named_parameters()]  # of the local parameters

    def gather(self) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The model's state and the optimizer's, in the first process; None in the others."""
        packed = self._optimizer.state_dict()
        (group,) = packed["param_groups"]
        local = {self._positions[number]: state for number, state in packed["state"].items()}
        parts = self._team.gather((self._pipe.state_dict(), local))
        if parts is None:
            return None
        model = {name: tensor for of_model, _ in parts for name, tensor in of_model.items()}
        states = {position: state for _, of_optimizer in parts for position, state in of_optimizer.items()}
        return (
            {name: model[name] for name in self._names},
            {"state": states, "param_groups": [group | {"params": list(range(len(self._names)))}]},
        )

    def load(self, model: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Loads this process's part.

        Raises RuntimeError, ValueError, KeyError or TypeError if the state does not fit.
        """
        self._pipe.load_state_dict(model)
        (group,) = optimizer["param_groups"]
        if len(group["params"]) != len(self._names):
            raise ValueError(f"the optimizer's state has {len(group['params'])} parameters")
        states = optimizer["state"]
        self._optimizer.load_state_dict(
            {
                "state": {n: states[p] for n, p in enumerate(self._positions) if p in states},
                "param_groups": [group | {"params": list(range(len(self._positions)))}],
            }
        )
