"""Finds what a loss or a stage's result depends on, and refuses what another stage computes or holds.

A stage's backward begins at its own results and ends at what it received. A parameter of another stage would be
written by two threads, and a tensor that another stage left in an attribute is of another microbatch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from ..errors import InvalidArgument
from ..model.module_watch import ModuleWatch
from ..model.slice import Slice
from .boundary import Received

_INSTEAD = (
    "give penalties on weights, and losses that a stage's layers keep in attributes, as stage_loss= of "
    "Pipeline, a function of the stage's module; or return them from their own stage with pipeline_ext.WithLoss"
)


def reached(roots: Sequence[Tensor], stops: Iterable[Tensor] = ()) -> list[Tensor]:
    """The leaves to which a backward from ``roots`` leads, but not by ``stops``."""
    seen: set[Node | None] = {tensor.grad_fn for tensor in stops}
    todo = [tensor.grad_fn for tensor in roots if tensor.grad_fn is not None]
    leaves = [tensor for tensor in roots if tensor.grad_fn is None and tensor.requires_grad]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo += [child for child, _ in node.next_functions if child is not None]
    return leaves


class Owners:
    """The stage of each parameter of a model."""

    def __init__(self, stages: Mapping[int, Sequence[nn.Module]]) -> None:
        """``stages``: the modules of all stages that are given as modules, also those of other processes."""
        self._stages = stages
        self._watch = ModuleWatch(module for modules in stages.values() for module in modules)
        self._find()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them, each once."""
        return self._watch.parameters

    def refresh(self) -> None:
        """Follows parameters that were replaced since."""
        if self._watch.changed():
            self._find()

    def _find(self) -> None:
        self._of: dict[Tensor, dict[int, str]] = {}
        for stage, modules in self._stages.items():
            for module in modules:
                for name, parameter in module.named_parameters(remove_duplicate=False):
                    self._of.setdefault(parameter, {}).setdefault(stage, _unsplit_name(module, name))

    def of(self, stage: int) -> list[tuple[str, Tensor]]:
        """The parameters of a stage, by their names in the model."""
        return [(held[stage], parameter) for parameter, held in self._of.items() if stage in held]

    def without_gradient(self, stages: Iterable[int]) -> list[str]:
        """The names of these stages' parameters that could have a gradient and have none."""
        chosen = set(stages)
        return [
            next(iter(held.values()))
            for parameter, held in self._of.items()
            if parameter.requires_grad and parameter.grad is None and not chosen.isdisjoint(held)
        ]

    def foreign(self, leaves: Iterable[Tensor], stage: int) -> list[tuple[Tensor, str]]:
        """The leaves that are parameters of other stages, but not of ``stage``, with what to call them."""
        found = []
        for leaf in leaves:
            held = self._of.get(leaf)
            if held is not None and stage not in held:
                other, name = next(iter(held.items()))
                found.append((leaf, f"{name}, a parameter of stage {other}"))
        return found

    def check(self, what: str, leaves: Sequence[Tensor], stage: int, received: Iterable[Received]) -> None:
        """Raises InvalidArgument if ``what`` depends on another stage other than by what it ``received``."""
        for _, name in self.foreign(leaves, stage):
            raise InvalidArgument(
                f"{what} depends on {name}, other than by what stage {stage} received from the stage before, "
                f"so its gradient would be lost or wrong; {_INSTEAD}"
            )
        own = {id(r.leaf) for r in received}
        if any(hasattr(leaf, "_of_a_boundary") and id(leaf) not in own for leaf in leaves):
            raise InvalidArgument(
                f"{what} depends on a tensor that was computed for another microbatch, or in another stage, "
                f"and kept in an attribute, so its gradient would be wrong; {_INSTEAD}"
            )


def _unsplit_name(module: nn.Module, name: str) -> str:
    if isinstance(module, Slice):
        _, layer, rest = name.split(".", 2)
        return f"{module.names[int(layer)]}.{rest}"
    return name


class NoDerivativeByReceived(TorchFunctionMode):
    """Refuses ``torch.autograd.grad`` by one of several tensors that a stage received.

    The others may depend on it, in an earlier stage that is not in this graph.
    """

    def __init__(self, received: Any) -> None:
        """``received``: the tensors, as the stage's module got them."""
        super().__init__()
        self._received = {id(tensor) for tensor in received}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") == "grad" and function.__module__ == "torch.autograd":
            inputs = args[1] if len(args) > 1 else kwargs.get("inputs", ())
            for tensor in (inputs,) if isinstance(inputs, Tensor) else inputs:
                if id(tensor) in self._received and len(self._received) > 1:
                    raise InvalidArgument(
                        "loss_fn takes a derivative (torch.autograd.grad) by a tensor that the last stage "
                        "received from the stage before, but what else it received may depend on that tensor "
                        "too, in stages that are not in its graph, so the derivative would lack terms; compute "
                        "it in one stage: cut the model so that all layers from that tensor on are in the last "
                        "stage"
                    )
        return function(*args, **kwargs)
