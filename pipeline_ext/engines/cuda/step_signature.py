"""A step's signature: what its shapes may depend on. Steps with the same one send messages of one format."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import _C
from ...base.comparable import comparable
from ...errors import PipelineError
from ...model.module_watch import ModuleWatch
from ...processes.failure import GRACE, Failure
from ...processes.group import Processes, seconds
from ...stages.stage import Stage
from ...stages.step import Step
from ...transport.description import Description
from ...transport.encoding import decode, encode
from ...transport.flow import Flow
from .descriptions import Descriptions

_MOST = 64  # signatures that are remembered

_K = TypeVar("_K")
_V = TypeVar("_V")


class StepSignatures:
    """The signatures of the steps that have run, as all processes of a pipeline together see them.

    Two steps have the same signature if no process sees a difference in what shapes may depend on: the shapes
    and types of its inputs, values that are not tensors, its modules' modes, and which parameters are trained.
    Messages are described once for each signature.
    """

    def __init__(
        self, stages: list[Stage], processes: Processes, failure: Failure, descriptions: Descriptions
    ) -> None:
        self._watch = ModuleWatch(module for stage in stages for module in stage.modules())
        self._parameters = self._watch.parameters
        self._processes = processes
        self._failure = failure
        self._descriptions = descriptions
        self._count = 0
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()  # of signatures as this process sees them
        self._met: OrderedDict[str, dict[str, Description]] = OrderedDict()  # signatures, with messages by name
        self._now = ""
        self._is_new = False
        self._described: dict[str, Description] = {}

    def begin(self, plan: _C.Plan, step: Step, timeout: float) -> None:
        """Begins a step. All processes call it together.

        Raises PeerError if one has failed or gone, StepTimeout if one does not come in time.
        """
        agreed = self.agree(self._signature_of(plan, step), timeout)
        assert agreed is not None  # no process has none here
        self._now = agreed
        self._is_new = self._now not in self._met
        self._described = _latest(self._met, self._now, {})
        self._descriptions.timeout = timeout

    def agree(self, key: Hashable | None, timeout: float) -> str | None:
        """One name for the keys of all processes; None if one of them has None.

        Raises as ``begin`` does.
        """
        self._count += 1
        mine = torch.tensor([0 if key is None else _latest(self._numbers, key, self._count)])
        found = [torch.empty_like(mine) for _ in self._processes.members]
        work = self._processes.messages.all_gather(found, mine, seconds(timeout + GRACE))
        self._failure.finish(work, timeout, "all processes to begin a step")
        return "-".join(str(int(number)) for number in found) if all(found) else None

    def of_flow(self, flow: Flow, name: str) -> "FormatsOfFlow":
        """The ``KnownMessages`` of a flow; no other flow has this name."""
        return FormatsOfFlow(self, flow, name)

    def known(self, message: str) -> Description | None:
        """The description of a message of this step, by name; None if it is not known yet."""
        return self._described.get(message)

    def tell(self, message: str, flow: Flow, index: int, description: Description) -> None:
        """As ``KnownMessages``."""
        if not self._is_new:
            raise PipelineError(
                f"{flow.describe(index)} differ in shape, or in a value that is not a tensor, from those of an "
                "earlier step with the same kinds of inputs, which the receiving process expects; "
                "between processes with GPUs shapes may depend on the shapes of inputs, not on their values"
            )
        self._descriptions.tell(f"{self._now}/{message}", encode(description, flow.wire))
        self._described[message] = description

    def ask(self, message: str, flow: Flow, index: int) -> Description:
        """As ``KnownMessages``."""
        if message not in self._described:
            told = self._descriptions.hear(f"{self._now}/{message}", f"what {flow.describe(index)} are")
            self._described[message] = decode(told)
        return self._described[message]

    def _signature_of(self, plan: _C.Plan, step: Step) -> Hashable:
        if self._watch.changed():
            self._parameters = self._watch.parameters
        leaves, spec = pytree.tree_flatten(step.inputs)
        return (
            (plan.has_backward, plan.num_microbatches, step.context),
            spec,
            tuple(map(_look, leaves)),
            tuple(parameter.requires_grad for parameter in self._parameters),
            tuple(module.training for module in self._watch.modules),
        )


class FormatsOfFlow(NamedTuple):
    """The ``KnownMessages`` of one flow."""

    signatures: StepSignatures
    flow: Flow
    name: str

    def known(self, index: int) -> Description | None:
        return self.signatures.known(f"{self.name}/{index}")

    def tell(self, index: int, description: Description) -> None:
        self.signatures.tell(f"{self.name}/{index}", self.flow, index, description)

    def ask(self, index: int) -> Description:
        return self.signatures.ask(f"{self.name}/{index}", self.flow, index)


def _look(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.requires_grad
    found = comparable(leaf)
    return object() if found is None else found  # equal to nothing else


def _latest(known: OrderedDict[_K, _V], key: _K, value: _V) -> _V:
    """The value known for ``key``, or ``value``, which is then stored. Forgets the least recently used."""
    value = known.setdefault(key, value)
    known.move_to_end(key)
    if len(known) > _MOST:
        known.popitem(last=False)
    return value
