"""Parameters that stages in several processes hold.

Each of these processes has one of its own. They begin equal, and when a step has ended each has the sum of all
their gradients; so optimizers keep them equal.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..processes.connections import Connections
from ..processes.group import Processes

Add = Callable[[Tensor, Connections], None]  # makes a tensor the sum of those of connected processes


class _Tie(NamedTuple):
    """A parameter that this process and others hold."""

    owner: nn.Module
    name: str
    among: Connections  # of them all

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.name]


class Ties:
    """The parameters of this process that others hold, too; made by all processes of a pipeline together."""

    def __init__(
        self, stages: Sequence[Any], loss_fn: Any, rank_of_stage: Sequence[int], processes: Processes
    ) -> None:
        """To be made before the stages get memory here and none elsewhere, which would tell them apart.

        The last stage's process has ``loss_fn``, too, which may be a module.
        """
        holders: dict[nn.Parameter, set[int]] = {}
        places: dict[nn.Parameter, tuple[nn.Module, str]] = {}  # of this process
        for stage, rank in [*zip(stages, rank_of_stage), (loss_fn, rank_of_stage[-1])]:
            for owner in stage.modules() if isinstance(stage, nn.Module) else ():
                for name, parameter in owner._parameters.items():
                    if parameter is not None:
                        holders.setdefault(parameter, set()).add(rank)
                        if rank == processes.rank:
                            places.setdefault(parameter, (owner, name))
        opened: dict[tuple[int, ...], Connections] = {}
        self._ties = []
        for parameter, ranks in holders.items():
            if len(ranks) > 1 and parameter in places:
                members = tuple(processes.members[rank] for rank in sorted(ranks))
                if members not in opened:
                    opened[members] = processes.connect("ties", members)
                self._ties.append(_Tie(*places[parameter], opened[members]))

    def make_equal(self) -> None:
        """Gives all the values that the first process has."""
        with torch.no_grad():
            for tie in self._ties:
                tie.among.broadcast(tie.parameter, 0).wait()

    def begin(self) -> None:
        """Leaves the gradients of earlier steps to the first process alone, lest they count several times."""
        for tie in self._ties:
            if tie.among.rank > 0:
                tie.parameter.grad = None

    def end(self, add: Add) -> None:
        """Gives each process the sum of all gradients; where none has one, there is none."""
        for tie in self._ties:
            parameter = tie.parameter
            reached = torch.tensor(float(parameter.grad is not None))
            add(reached, tie.among)
            if not reached:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            total = parameter.grad.contiguous()
            add(total, tie.among)
            if total is not parameter.grad:
                parameter.grad.copy_(total)
