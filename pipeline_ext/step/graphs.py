"""Whole steps as CUDA graphs: the engine's own eager step, captured once and launched as one.

A replay reads and writes the addresses of the captured step. So batches are copied into the graph's own
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

from ..engines.cuda import torch_side
from ..engines.cuda.device_engine import DeviceEngine
from ..engines.cuda.device_step import DeviceStep
from ..engines.protocol import Engine, Route
from ..errors import PipelineError, StepTimeout
from ..stages.stage import Stage
from ..stages.ties import Ties
from ..transport.format import Format
from .batch import Batch, Outcome
from .failure import NO_GRADIENTS
from .graph_key import GraphKeys, NotCapturable, check_capturable
from .stepper import Stepper

WARM_UP_STEPS = 2
_MOST_GRAPHS = 4  # kept at once
_MOST_CAPTURES = 64
_ELSEWHERE = "it cannot be captured in another process"
_MOST_KEYS = 16  # of steps that have not come a third time


@dataclass
class GraphReport:
    """What ``graphs=True`` has done so far.

    Attributes:
        nodes: the number of nodes of the graph that was launched last; 0 before the first.
        captured: the number of graphs captured.
        fallback: why steps run eagerly instead; None while they may be captured.
    """

    nodes: int = 0
    captured: int = 0
    fallback: str | None = None


class _Captured(NamedTuple):
    graph: torch_side.Graph
    batch: list[Tensor]  # the graph's own
    outcome: Outcome  # without its losses
    losses: Tensor | None  # of all microbatches; None if the caller did not ask for them
    gradients: list[Tensor | None]  # one for each parameter
    formats: list[Format]  # of its messages: the graph reads their tables


class StepGraphs:
    """Runs one pipeline's steps: the first steps with one key eagerly, later ones as a graph.

    Attributes:
        report: what it has done so far.
    """

    def __init__(
        self,
        engine: DeviceEngine | None,
        modules: Sequence[nn.Module],
        optimizer: torch.optim.Optimizer | None,
        timeout: float,
    ) -> None:
        self.report = GraphReport()
        self._gpus = engine
        self._keys = GraphKeys(modules, optimizer)
        self._timeout = timeout
        self._seen: dict[Hashable, int] = {}
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._recorded: Callable[[], DeviceStep | None] = lambda: None  # the last one, while anyone holds it
        self._memory: torch_side.GraphMemory | None = None  # shared by all graphs: they never run together

    @classmethod
    def of(
        cls,
        engine: Engine[Any],
        route: Route,
        stages: Sequence[Stage],
        ties: Ties,
        optimizer: torch.optim.Optimizer | None,
        timeout: float,
    ) -> "StepGraphs":
        """The graphs of a pipeline. If its steps cannot be captured, they run eagerly from the start."""
        modules = [module for stage in stages for module in stage.modules()]
        graphs = cls(engine if isinstance(engine, DeviceEngine) else None, modules, optimizer, timeout)
        if not isinstance(engine, DeviceEngine):
            graphs.fall_back("the ranks are on the CPU")
            return graphs
        reason = _obstacle(engine, route, ties, optimizer)
        if engine.agreed_key("graphs" if reason is None else None, timeout) is None:
            graphs.fall_back(reason or _ELSEWHERE)
        return graphs

    def _engine(self) -> DeviceEngine:
        assert self._gpus is not None  # without GPUs all steps run eagerly
        return self._gpus

    def fall_back(self, reason: str) -> None:
        """From now on steps run eagerly."""
        self.report.fallback = reason
        self._graphs.clear()
        print(f"graphs=True: steps run eagerly because {reason}")

    def step(self, batch: Batch, stepper: Stepper) -> Outcome:
        """Runs a step. The results belong to the caller, even if a graph computed them.

        Raises as ``Pipeline.step`` does.
        """
        if self.report.fallback is not None:
            return stepper.train(batch)
        leaves, spec = pytree.tree_flatten((batch.inputs, batch.target))
        key = reason = None
        try:
            key = self._keys.of(leaves, spec, batch, stepper.caller_context())
        except NotCapturable as found:
            reason = str(found)
        key = self._agree(key, stepper)
        if key is None:
            self.fall_back(reason or _ELSEWHERE)
            return stepper.train(batch)
        captured = self._graphs.get(key)
        if captured is None:
            seen = self._seen.get(key, 0)
            if seen < WARM_UP_STEPS:
                outcome = stepper.train(batch)
                self._seen[key] = seen + 1  # a failed step does not count
                self._check_keys()
                return outcome
            captured = self._capture(leaves, spec, batch, stepper)
            if captured is None:
                assert self._memory is not None
                self._memory.release()  # here nothing holds what the capture has made
                return stepper.train(batch)
            self._seen.clear()
            self._graphs[key] = captured
            if len(self._graphs) > _MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        # The replay overwrites the times of the last trace; they are read before only if someone else holds it.
        stepper.trace = None
        stepper.begun = True
        outcome = self._replay(captured, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
        stepper.keep_trace(outcome.result, batch.record)
        return outcome

    def _agree(self, key: Hashable | None, stepper: Stepper) -> Hashable | None:
        try:
            return self._engine().agreed_key(key, self._timeout)
        except PipelineError as error:
            self._engine().failed(f"{type(error).__name__}: {error}")
            stepper.give_up()
            error.add_note(NO_GRADIENTS)
            raise

    def _check_keys(self) -> None:
        if len(self._seen) > _MOST_KEYS or self.report.captured >= _MOST_CAPTURES:
            self.fall_back(
                "too many steps differ from one another: in the shapes of batches, in values that are not "
                "tensors, or in the optimizer's settings (lr may be a tensor on the GPU)"
            )

    def _capture(
        self, leaves: list[Any], spec: pytree.TreeSpec, batch: Batch, stepper: Stepper
    ) -> _Captured | None:
        own = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        inputs, target = pytree.tree_unflatten(own, spec)
        parameters = self._keys.parameters
        before = [p.grad for p in parameters]
        if self._memory is None:
            self._memory = torch_side.GraphMemory(self._engine().devices[0])
        graph = torch_side.Graph(self._memory)
        try:
            with self._engine().capturing(), graph.capture():
                outcome = stepper.train(batch._replace(inputs=inputs, target=target))
                kept = [loss for loss in outcome.losses if loss is not None] if batch.keep_losses else []
                losses = torch.stack(kept) if kept else None
            reason = None
        except Exception as error:
            reason = f"the step cannot be captured: {_root(error)}"
        if self._agree("captured" if reason is None else None, stepper) is None:
            for parameter, grad in zip(parameters, before):
                parameter.grad = grad
            self.fall_back(reason or _ELSEWHERE)
            return None
        self.report.captured += 1
        gradients = [p.grad for p in parameters]
        own = [leaf for leaf in own if isinstance(leaf, Tensor)]
        formats = stepper.routes.train.exchange.formats
        return _Captured(graph, own, outcome._replace(losses=[]), losses, gradients, formats)

    def _replay(self, captured: _Captured, tensors: list[Tensor]) -> Outcome:
        recorded = self._recorded()
        if recorded is not None:
            recorded.read()
        full = self._engine().wait_for_room(self._timeout)
        if full is not None:
            raise StepTimeout(f"nothing was run: in {self._timeout:g} seconds{full.waiting}")
        with torch.no_grad():
            if tensors:
                torch._foreach_copy_(captured.batch, tensors)
            self._keys.put_gradients(captured.gradients)
            captured.graph.replay()
            # Copies for the caller: the next replay overwrites all of the graph's memory.
            loss, _, outputs, step = captured.outcome
            loss = loss.clone()
            losses = [] if captured.losses is None else list(captured.losses.clone().unbind())
            outputs = pytree.tree_map_only(Tensor, torch.clone, outputs)
        self._engine().mark()
        step = step.again()
        self._recorded = weakref.ref(step) if step.recorded else lambda: None
        self.report.nodes = step.num_nodes
        return Outcome(loss, [*losses], outputs, step)


def _obstacle(
    engine: DeviceEngine, route: Route, ties: Ties, optimizer: torch.optim.Optimizer | None
) -> str | None:
    """Why no step can be captured; None if steps may be."""
    if ties:
        return "processes share parameters, whose gradients they add up on their hosts"
    if engine.averages:
        return "hosts agree in each step on which gradients the replicas of a mesh average"
    if len(set(engine.devices)) > 1:
        return "the ranks are on several GPUs, and a graph's memory is on one"
    if route.exchange.packs_for_others:
        return "messages between processes are packed (pack, wire), whose formats no graph keeps"
    if optimizer is not None:
        try:
            check_capturable(optimizer)
        except NotCapturable as reason:
            return str(reason)
    return None


def _root(error: BaseException) -> str:
    """The error that was raised first: ending a failed capture raises another one."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return f"{type(error).__name__}: {error}"
