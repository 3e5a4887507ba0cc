"""Parameters that several stages hold.

Backwards on two threads must not add to one ``.grad``, and the sum must not depend on which came first. So each
stage that holds such a parameter runs its forward on an alias of it. When the step has ended, the aliases'
gradients are added up in the order of the stages.
"""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import nn

from .aliases import Holder, alias, check_no_hooks, holders
from .gradients import add_gradient
from .parameter_view import prepare

Body = Callable[[int], None]


class SharedParameters:
    """The parameters that several stages hold.

    Stages that hold the same module with such a parameter
    take turns in their forwards.
    """

    def __init__(self, by_stage: Mapping[int, Sequence[nn.Module]]) -> None:
        """``by_stage``: the modules of each stage."""
        self._by_stage = by_stage
        self._turns = threading.Lock()
        self._aliases: dict[nn.Parameter, dict[int, nn.Parameter]] = {}
        self._find()

    def _find(self) -> None:
        by_stage = {stage: list(holders(modules)) for stage, modules in self._by_stage.items()}
        stages: dict[nn.Parameter, set[int]] = {}
        for stage, found in by_stage.items():
            for holder in found:
                stages.setdefault(holder.parameter, set()).add(stage)
        self._holders: dict[int, list[Holder]] = {
            stage: [holder for holder in found if len(stages[holder.parameter]) > 1]
            for stage, found in by_stage.items()
        }
        self._stages = {parameter: sorted(held) for parameter, held in stages.items() if len(held) > 1}
        prepare({holder.owner for found in self._holders.values() for holder in found})
        owners = {stage: {holder.owner for holder in found} for stage, found in self._holders.items()}
        self._take_turns = {
            stage: any(mine & others for other, others in owners.items() if other != stage)
            for stage, mine in owners.items()
        }

    def parameters(self) -> Collection[nn.Parameter]:
        """The parameters that several stages hold."""
        return self._stages.keys()

    def originals(self) -> dict[nn.Parameter, nn.Parameter]:
        """The parameter of each alias of this step."""
        return {of_stage: p for p, aliases in self._aliases.items() for of_stage in aliases.values()}

    def target(self, stage: int, parameter: nn.Parameter) -> nn.Parameter:
        """Where to add the gradients that a stage finds for one of its parameters in this step."""
        if not self._aliases:  # a look-up by parameter takes a microsecond
            return parameter
        return self._aliases.get(parameter, {}).get(stage, parameter)

    def watch(self, stage: int, forward: Body) -> Body:
        """Wraps a stage's ``forward`` to run on the stage's aliases."""

        def watched(m: int) -> None:
            if not self._holders[stage]:
                forward(m)
            elif self._take_turns[stage]:
                with self._turns:
                    self._run_on_aliases(stage, forward, m)
            else:
                self._run_on_aliases(stage, forward, m)

        return watched

    def _run_on_aliases(self, stage: int, forward: Body, m: int) -> None:
        for holder in self._holders[stage]:
            holder.put(self._aliases[holder.parameter][stage])
        try:
            forward(m)
        finally:
            self._restore(stage)

    def _restore(self, stage: int) -> None:
        for holder in self._holders[stage]:
            holder.restore()

    def begin(self) -> None:
        """Makes the aliases of one step. Raises InvalidArgument for a tied parameter with a hook."""
        if not all(holder.is_current() for found in self._holders.values() for holder in found):
            self._find()
        check_no_hooks(
            self._stages, "several stages hold the parameter, each of which finds a part of its gradient"
        )
        self._aliases = {
            parameter: {stage: alias(parameter) for stage in stages}
            for parameter, stages in self._stages.items()
        }

    def end(self) -> None:
        """Adds each stage's gradients to those of the parameters."""
        for parameter, aliases in self._aliases.items():
            for of_stage in aliases.values():
                if of_stage.grad is not None:
                    add_gradient(parameter, of_stage.grad)
        self._aliases = {}

    def give_up(self) -> None:
        """Restores the parameters if a stage that never returned left its aliases in their place."""
        for stage in self._holders:
            self._restore(stage)
