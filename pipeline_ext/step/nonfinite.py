"""What becomes of a step with a loss or a gradient that is not finite: ``Pipeline(nonfinite=)``."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument, NonFiniteError
from ..reduction.replica_reduction import ReplicaReduction
from ..stages.finite import GRADIENT, LOSS, RESULT, Watch, are_finite
from ..stages.reach import Owners
from ..stages.stage import Stage
from ..stages.step import Step
from .failure import NO_GRADIENTS

RAISE, WARN, SKIP = POLICIES = ("raise", "warn", "skip")

AddUp = Callable[[Tensor], None]  # makes a tensor the sum of those of all processes

_PARAMETERS = 3  # of a stage: their gradients, after the kinds that a watch knows


class Origin(NamedTuple):
    """What is not finite, and where that began, as far as it is known."""

    text: str
    stage: int | None = None
    microbatch: int | None = None


@dataclass(kw_only=True, eq=False)
class NonFinite:
    """Looks at each training step, and says whether its gradients may be used.

    Attributes:
        policy: None looks at the loss alone, where no GPU has to be waited for, and warns once.
        scaled: a gradient scaler looks at the gradients.
        skipped: steps so far whose gradients were dropped.
    """

    policy: str | None
    stages: Sequence[Stage]
    owners: Owners
    num_stages: int
    add_up: AddUp | None
    reduction: ReplicaReduction | None
    scaled: bool
    skipped: int = field(default=0, init=False)
    _warned: bool = field(default=False, init=False)

    def watch(self, microbatches: int) -> Watch | None:
        """What looks at the values of a step, if the policy asks for it."""
        return None if self.policy is None else Watch(self.num_stages, microbatches)

    def check(self, step: Step) -> None:
        """Raises InvalidArgument for a step of which something would be left if it is skipped."""
        if self.policy == SKIP and any(step.input_tensors):
            raise InvalidArgument(
                'an input requires a gradient, and nonfinite="skip" cannot take back what a step hands to the '
                'graph that made it; give nonfinite="raise", and set those gradients to None when it raises'
            )

    def find(self, step: Step, loss: Tensor, reduces: bool, timeout: float) -> Origin | None:
        """Called when a step has its gradients; the same in all processes and replicas.

        ``loss``: the step's. ``reduces``: whether the replicas have just averaged their gradients. If they have
        not, a step to drop is left to the next that does, in which all of them find what is in ``.grad``.
        """
        if step.watch is None:
            return self._of_loss(step, loss)
        table = self._table(step.watch)
        if self.add_up is not None:
            self.add_up(table)
        bad = bool(table[:, [LOSS, _PARAMETERS]].any())
        if self.reduction is not None and self.policy != WARN:
            if not reduces:
                return None
            anywhere = self.reduction.mean(float(bad), timeout) > 0
            if anywhere and not bad:
                return Origin("a loss of another replica")
        return self._origin(table, step) if bad else None

    def drops(self, origin: Origin | None) -> bool:
        """Whether a step with this origin loses its gradients."""
        return origin is not None and self.policy in (RAISE, SKIP)

    def act(self, origin: Origin | None) -> None:
        """Raises NonFiniteError, or warns."""
        if origin is None:
            return
        if self.policy == RAISE:
            raise NonFiniteError(
                f"{origin.text} is not finite; {NO_GRADIENTS}; the next step works. Look for the cause there, "
                'or give nonfinite="skip" to leave such steps out',
                stage=origin.stage,
                microbatch=origin.microbatch,
            )
        if self.policy == SKIP:
            self.skipped += 1
            told = f"{NO_GRADIENTS}, so that an optimizer leaves this step out"
        elif self.policy == WARN:
            told = "the gradients are left as they are"
        else:
            told = 'the gradients are left as they are; nonfinite="raise" of Pipeline finds the stage'
        warnings.warn(f"{origin.text} is not finite; {told}", stacklevel=5)

    def _of_loss(self, step: Step, loss: Tensor) -> Origin | None:
        """The first loss that is not finite, if this is the first time and it can be seen without waiting."""
        if self._warned or self.scaled or loss.device.type != "cpu" or math.isfinite(loss):
            return None
        self._warned = True
        if not self.stages[-1].is_last:
            return None  # the process with the last stage tells it
        own = ((m, of_m) for m, of_m in enumerate(step.losses) if of_m is not None and step.loss_weight(m))
        found = next((m for m, of_m in own if not math.isfinite(of_m)), None)
        return Origin("the step's loss" if found is None else f"the loss of microbatch {found}", None, found)

    def _table(self, watch: Watch) -> Tensor:
        """By stage and kind: 1 and the number of the first microbatch that is not finite; 0 if none is."""
        table = torch.zeros(self.num_stages, _PARAMETERS + 1, dtype=torch.float64, device="cpu")
        for stage in self.stages:
            for kind in (RESULT, LOSS, GRADIENT):
                found = watch.first(kind, stage.index)
                table[stage.index, kind] = 0 if found is None else 1 + found
            if not self.scaled:
                gradients = (parameter.grad for parameter in stage.parameters())
                table[stage.index, _PARAMETERS] = not are_finite(gradients)
        return table

    def _origin(self, table: Tensor, step: Step) -> Origin:
        """Forwards are first, by microbatch and stage; then backwards, from the last stage."""
        numbers = table.int().tolist()
        forwards = [
            (row[kind] - 1, s, kind) for s, row in enumerate(numbers) for kind in (RESULT, LOSS) if row[kind]
        ]
        if forwards:
            m, s, kind = min(forwards)
            if kind == RESULT:
                return Origin(f"the result of stage {s} for microbatch {m}{self._cause(step, s, m)}", s, m)
            whose = "" if s == self.num_stages - 1 else f" that stage {s} adds"
            return Origin(f"the loss{whose} of microbatch {m}{self._cause(step, s, m)}", s, m)
        backwards = [(row[GRADIENT] - 1, -s) for s, row in enumerate(numbers) if row[GRADIENT]]
        if backwards:
            m, from_last = min(backwards)
            s = -from_last
            return Origin(f"the gradient that stage {s} sends back for microbatch {m}", s, m)
        s = max(s for s, row in enumerate(numbers) if row[_PARAMETERS])
        name = self._name(s, lambda parameter: parameter.grad)
        return Origin(f"the gradient of {name or 'a parameter'} of stage {s}", s)

    def _cause(self, step: Step, s: int, m: int) -> str:
        """What the stage was given that was not finite already, if that can be seen here."""
        name = self._name(s, lambda parameter: parameter)
        if name is not None:
            return f" (as its parameter {name} is already)"
        if s == 0 and step.inputs is not None:
            given = [leaf for leaf in pytree.tree_leaves(step.inputs[m]) if isinstance(leaf, Tensor)]
            if not are_finite(given):
                return " (as its input is already)"
        return ""

    def _name(self, s: int, value: Callable[[Tensor], Tensor | None]) -> str | None:
        """The first parameter of the stage whose value is not finite."""
        if all(stage.index != s for stage in self.stages):
            return None  # another process has it
        bad = (name for name, parameter in self.owners.of(s) if not are_finite([value(parameter)]))
        return next(bad, None)
