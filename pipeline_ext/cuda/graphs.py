"""Whole steps as CUDA graphs: the engine's own eager step, captured once and launched as one.

What a captured step computes with must lie where it lay then. So batches are copied into the graph's own
tensors, and the gradients are the graph's own.
"""

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..context import CallerContext
from ..engine import Engine, Route
from ..errors import StepTimeout
from ..failure import NO_GRADIENTS
from ..stage import Stage
from ..step import Batch, Outcome
from ..stepper import Stepper
from . import torch_side
from .device_step import DeviceStep
from .engine import DeviceEngine

WARM_UP_STEPS = 2
_MOST_GRAPHS = 4  # kept at once
_MOST_KINDS = 16  # of steps, none of which came a third time


@dataclass
class GraphReport:
    """What has become of ``graphs=True``.

    Attributes:
        nodes: of the graph that was launched last; 0 before the first.
        captured: graphs so far.
        fallback: why steps run eagerly instead; None while nothing stands in the way.
    """

    nodes: int = 0
    captured: int = 0
    fallback: str | None = None


class _Captured(NamedTuple):
    graph: torch_side.Graph
    batch: list[Tensor]  # the graph's own
    outcome: Outcome  # its losses as one tensor
    gradients: list[Tensor | None]  # by parameter


class StepGraphs:
    """Runs one pipeline's steps: of each kind the first ones eagerly, the others as a graph.

    Steps are of one kind where these agree: shapes, types and what is no tensor in the batch; the caller's
    context; which gradients there are already; the modes of the modules; where parameters and buffers lie; and
    the optimizer's settings and state.
    """

    def __init__(
        self,
        engine: DeviceEngine,
        modules: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer | None,
        timeout: float,
    ) -> None:
        self.report = GraphReport()
        self._engine = engine
        self._modules = list(dict.fromkeys(m for module in modules for m in module.modules()))
        self._buffers = [module._buffers for module in self._modules if module._buffers]
        self._parameters = list(dict.fromkeys(p for module in modules for p in module.parameters()))
        self._optimizer = optimizer
        self._timeout = timeout
        self._seen: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._recorded: Callable[[], DeviceStep | None] = lambda: None  # the last one, while anyone has it
        self._memory = torch_side.GraphMemory()

    @classmethod
    def of(
        cls,
        engine: Engine,
        route: Route,
        stages: Sequence[Stage],
        optimizer: torch.optim.Optimizer | None,
        timeout: float,
    ) -> "StepGraphs":
        """The graphs of a pipeline, where its steps can be captured."""
        modules = [module for stage in stages for module in stage.modules()]
        graphs = cls(engine, modules, optimizer, timeout)
        if not isinstance(engine, DeviceEngine):
            graphs.fall_back("the ranks are on the CPU")
        elif len(set(engine.devices)) > 1:
            graphs.fall_back("the ranks are on several GPUs, and a graph's memory is of one")
        elif route.exchange.packs:
            graphs.fall_back("results are packed (pack, wire), for which tables go up from the host")
        elif optimizer is not None and not _is_capturable(optimizer):
            graphs.fall_back(
                f"{type(optimizer).__name__} counts its steps on the host; make it with capturable=True"
            )
        return graphs

    def fall_back(self, reason: str) -> None:
        """From now on steps run eagerly."""
        self.report.fallback = reason
        self._graphs.clear()
        print(f"graphs=True: steps run eagerly, for {reason}")

    def step(self, batch: Batch, stepper: Stepper) -> Outcome:
        """Runs a step. What it gives back is the caller's, also where a graph made it.

        Raises as ``Pipeline.step`` does.
        """
        if self.report.fallback is not None:
            return stepper.train(batch)
        leaves, spec = pytree.tree_flatten((batch.args, batch.kwargs, batch.target))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kind = self._kind(leaves, spec, batch, stepper.caller_context())
        captured = self._graphs.get(kind)
        if captured is None:
            if any(tensor.requires_grad for tensor in tensors):
                self.fall_back("an input requires a gradient")
                return stepper.train(batch)
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= WARM_UP_STEPS:
                if len(self._seen) > _MOST_KINDS:
                    self.fall_back(
                        f"{_MOST_KINDS} steps differed from one another: in the shapes of batches, in values "
                        "that are no tensors, or in the optimizer's settings, of which a tensor may be lr"
                    )
                return stepper.train(batch)
            captured = self._capture(leaves, spec, batch, stepper)
            if captured is None:
                return stepper.train(batch)
            self._seen.clear()
            self._graphs[kind] = captured
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(kind)
        stepper.trace = None  # its times are read before they are overwritten only if someone else has it
        try:
            outcome = self._replay(captured, tensors)
        except BaseException as error:
            stepper.give_up()
            error.add_note(NO_GRADIENTS)
            raise
        stepper.keep_trace(outcome.result, batch.record)
        return outcome

    def _kind(
        self, leaves: list[Any], spec: pytree.TreeSpec, batch: Batch, context: CallerContext
    ) -> Hashable:
        looks = tuple(
            (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in leaves
        )
        parameters = tuple((p.data_ptr(), p.requires_grad, p.grad is None) for p in self._parameters)
        buffers = tuple(b.data_ptr() for of in self._buffers for b in of.values() if b is not None)
        settings = None if self._optimizer is None else _settings(self._optimizer)
        modes = tuple(module.training for module in self._modules)
        how = (batch.keep_outputs, batch.keep_losses, batch.record, context)
        return looks, spec, how, parameters, buffers, modes, settings

    def _capture(
        self, leaves: list[Any], spec: pytree.TreeSpec, batch: Batch, stepper: Stepper
    ) -> _Captured | None:
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs, target = pytree.tree_unflatten(own, spec)
        before = [p.grad for p in self._parameters]
        graph = torch_side.Graph(self._memory)
        try:
            with self._engine.capturing(), graph.capture(self._engine.devices[0]):
                outcome = stepper.train(batch._replace(args=args, kwargs=kwargs, target=target))
                losses = torch.stack(outcome.losses) if batch.keep_losses else None
        except Exception as error:
            for parameter, grad in zip(self._parameters, before):
                parameter.grad = grad
            reason = _root(error)
            self.fall_back(f"the step cannot be captured: {type(reason).__name__}: {reason}")
            return None
        self.report.captured += 1
        gradients = [p.grad for p in self._parameters]
        own = [leaf for leaf in own if isinstance(leaf, Tensor)]
        return _Captured(graph, own, outcome._replace(losses=losses), gradients)

    def _replay(self, captured: _Captured, tensors: list[Tensor]) -> Outcome:
        recorded = self._recorded()
        if recorded is not None:
            recorded.read()
        full = self._engine.wait_for_room(self._timeout)
        if full is not None:
            raise StepTimeout(f"nothing was run: in {self._timeout:g} seconds{full.waiting}")
        with torch.no_grad():
            if tensors:
                torch._foreach_copy_(captured.batch, tensors)
            for parameter, gradient in zip(self._parameters, captured.gradients):
                if parameter.grad is not gradient:
                    if parameter.grad is not None and gradient is not None:
                        gradient.copy_(parameter.grad)
                    parameter.grad = gradient
            captured.graph.replay()
            # The next replay writes all that is the graph's.
            loss, losses, outputs, step = captured.outcome
            loss = loss.clone()
            losses = [] if losses is None else list(losses.clone().unbind())
            outputs = pytree.tree_map_only(Tensor, torch.clone, outputs)
        self._engine.mark()
        step = step.again()
        self._recorded = weakref.ref(step) if step.recorded else lambda: None
        self.report.nodes = step.num_nodes
        return Outcome(loss, losses, outputs, step)


def _settings(optimizer: torch.optim.Optimizer) -> Hashable:
    """All that a graph of its step depends on."""
    groups = [
        (name, value.data_ptr() if isinstance(value, Tensor) else repr(value))
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    return id(optimizer.state), tuple(groups)


def _is_capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step is the same sequence of operations each time; plain SGD's is."""
    if type(optimizer) is torch.optim.SGD:
        return True
    return all(group.get("capturable", False) for group in optimizer.param_groups)


def _root(error: BaseException) -> BaseException:
    """What was raised first: the end of a capture that was spoilt raises once more."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error
