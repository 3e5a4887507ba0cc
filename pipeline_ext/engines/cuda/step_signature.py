"""Kinds of steps, as all processes of a pipeline together see them: what messages of one hold is told once."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ... import _C
from ...errors import PipelineError
from ...model.module_watch import ModuleWatch
from ...processes.failure import GRACE, Failure
from ...processes.group import Processes, seconds
from ...stages.stage import Stage
from ...stages.step import Step
from ...transport.description import decode, encode
from ...transport.message import Contents
from ...transport.remote import Way
from .descriptions import Descriptions

_MOST = 64  # kinds that are remembered
_PLAIN = (int, float, complex, str, bytes, type(None))

_K = TypeVar("_K")
_V = TypeVar("_V")


class Kinds:
    """The kinds of steps that have run.

    Two steps are of one kind where no process sees a difference in what shapes may depend on: its inputs'
    shapes and types, and values that are no tensors; its modules' modes, and which parameters are trained.
    """

    def __init__(
        self, stages: list[Stage], processes: Processes, failure: Failure, descriptions: Descriptions
    ) -> None:
        self._watch = ModuleWatch(module for stage in stages for module in stage.modules())
        self._parameters = self._watch.parameters()
        self._processes = processes
        self._failure = failure
        self._descriptions = descriptions
        self._count = 0
        self._numbers: OrderedDict[Hashable, int] = OrderedDict()  # of kinds as this process sees them
        self._met: OrderedDict[str, dict[str, Contents]] = OrderedDict()  # kinds, with messages by name
        self._now = ""
        self._is_new = False
        self._contents: dict[str, Contents] = {}

    def begin(self, plan: _C.Plan, step: Step, timeout: float) -> None:
        """Begins a step, which all processes do together.

        Raises PeerError where one has failed or gone, StepTimeout where one does not come in time.
        """
        self._now = self.agree(self._kind_of(plan, step), timeout)
        self._is_new = self._now not in self._met
        self._contents = _latest(self._met, self._now, {})
        self._descriptions.timeout = timeout

    def agree(self, kind: Hashable | None, timeout: float) -> str | None:
        """The kind of a step in all processes together, of the one that each sees; None where one sees None.

        Raises as ``begin`` does.
        """
        self._count += 1
        mine = torch.tensor([0 if kind is None else _latest(self._numbers, kind, self._count)])
        found = [torch.empty_like(mine) for _ in self._processes.members]
        work = self._processes.messages.all_gather(found, mine, seconds(timeout + GRACE))
        self._failure.finish(work, timeout, "all processes to begin a step")
        return "-".join(str(int(number)) for number in found) if all(found) else None

    def of_way(self, way: Way, name: str) -> "KindsOfWay":
        """The ``Catalogue`` of a way, whose name no other has."""
        return KindsOfWay(self, way, name)

    def known(self, message: str) -> Contents | None:
        """What is in a message of this step, by name, where that has been told."""
        return self._contents.get(message)

    def tell(self, message: str, way: Way, index: int, contents: Contents) -> None:
        """As ``Catalogue``."""
        if not self._is_new:
            raise PipelineError(
                f"{way.describe(index)} differ in shape, or in a value that is no tensor, from those of an "
                "earlier step with inputs alike, for which the process that receives them has made ready; "
                "between processes with GPUs shapes may depend on the shapes of inputs, not on their values"
            )
        self._descriptions.tell(f"{self._now}/{message}", encode(contents, way.wire))
        self._contents[message] = contents

    def ask(self, message: str, way: Way, index: int) -> Contents:
        """As ``Catalogue``."""
        if message not in self._contents:
            told = self._descriptions.hear(f"{self._now}/{message}", f"what {way.describe(index)} are")
            self._contents[message] = decode(told)
        return self._contents[message]

    def _kind_of(self, plan: _C.Plan, step: Step) -> Hashable:
        if self._watch.changed():
            self._parameters = self._watch.parameters()
        leaves, spec = pytree.tree_flatten(step.inputs)
        return (
            (plan.has_backward, plan.num_microbatches, step.context),
            spec,
            tuple(map(_look, leaves)),
            tuple(parameter.requires_grad for parameter in self._parameters),
            tuple(module.training for module in self._watch.modules),
        )


class KindsOfWay(NamedTuple):
    """The ``Catalogue`` of one way."""

    kinds: Kinds
    way: Way
    name: str

    def known(self, index: int) -> Contents | None:
        return self.kinds.known(f"{self.name}/{index}")

    def tell(self, index: int, contents: Contents) -> None:
        self.kinds.tell(f"{self.name}/{index}", self.way, index, contents)

    def ask(self, index: int) -> Contents:
        return self.kinds.ask(f"{self.name}/{index}", self.way, index)


def _look(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.requires_grad
    return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else object()  # no two are known to be alike


def _latest(known: OrderedDict[_K, _V], key: _K, value: _V) -> _V:
    """What is known of ``key``, or from now on ``value``; what was looked up longest ago is forgotten."""
    value = known.setdefault(key, value)
    known.move_to_end(key)
    if len(known) > _MOST:
        known.popitem(last=False)
    return value
