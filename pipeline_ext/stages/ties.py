"""Parameters that stages in several processes hold.

Each of these processes has a copy. The copies begin equal, and at the end of a step each has the sum of all
their gradients, so optimizers keep them equal.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..processes.connections import Connections
from ..processes.group import Processes
from .aliases import Holder, holders

Add = Callable[[Tensor, Connections], None]  # makes a tensor the sum of those of connected processes


class _Tie(NamedTuple):
    """A parameter that this process and others hold."""

    owner: nn.Module
    name: str
    among: Connections  # of all processes that hold it

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.owner._parameters[self.name]
        assert parameter is not None
        return parameter


class Ties:
    """The parameters of this process that other processes hold too."""

    def __init__(self, ties: list[_Tie]) -> None:
        self._ties = ties

    def __bool__(self) -> bool:
        return bool(self._ties)

    def make_equal(self) -> None:
        """Gives all copies the values of the first process."""
        with torch.no_grad():
            for tie in self._ties:
                tie.among.make_equal(tie.parameter)

    def begin(self) -> None:
        """Keeps the gradients of earlier steps in the first process only, so that they count once."""
        for tie in self._ties:
            if tie.among.rank > 0:
                tie.parameter.grad = None

    def end(self, add: Add) -> None:
        """Gives each process the sum of all gradients; ``.grad`` stays None if no process has one."""
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


def find_ties(stages: Sequence[Any], loss_fn: Any, rank_of_stage: Sequence[int], processes: Processes) -> Ties:
    """The ties between the stages of several processes. All processes call it together.

    A stage must not have memory in one process and none in another, or its parameters look different.
    ``loss_fn`` belongs to the last stage's process, and may be a module.
    """
    holding: dict[nn.Parameter, set[int]] = {}
    here: dict[nn.Parameter, Holder] = {}
    for stage, rank in [*zip(stages, rank_of_stage, strict=True), (loss_fn, rank_of_stage[-1])]:
        for holder in holders([stage] if isinstance(stage, nn.Module) else []):
            holding.setdefault(holder.parameter, set()).add(rank)
            if rank == processes.rank:
                here.setdefault(holder.parameter, holder)
    opened: dict[tuple[int, ...], Connections] = {}
    ties = []
    for parameter, ranks in holding.items():
        if len(ranks) > 1 and parameter in here:
            members = tuple(processes.members[rank] for rank in sorted(ranks))
            if members not in opened:
                opened[members] = processes.connect("ties", members)
            ties.append(_Tie(here[parameter].owner, here[parameter].name, opened[members]))
    return Ties(ties)
