"""Splits a stage's backward: first the gradients of its inputs (``I``), later those of its weights (``W``).

Zero-bubble schedules split a backward where the paths to inputs and to weights separate (Qi et al., Zero Bubble
Pipeline Parallelism, ICLR 2024). torch.distributed.pipelining (2.13, ``_backward.py``) does so for any module,
with one backward for each group of weights, each of which walks the graph down to the inputs again. Here ``W``
runs only the forks a second time, the nodes at which the paths separate. Autograd's engine tells a node which
of its gradients are needed, so in ``W`` a fork computes only those that lead to weights.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

from ..base.imported import is_dtensor
from ..base.memory import is_shared
from .gradients import add_gradient

# A weight may be reached through at most two forks: adding two gradients is order-independent.
_MOST_USES = 2


class WeightGradients(Protocol):
    """The part of a backward that finds the gradients of the weights."""

    @property
    def whole(self) -> str:
        """Why the full backward ran already; empty if it was split."""

    def add(self) -> None:
        """Adds the gradients of the weights to their ``.grad``, and frees what they are made from."""


def run_backward(
    outputs: Sequence[Tensor | GradientEdge],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor] = (),
    keep_graph: bool = False,
) -> None:
    """``torch.autograd.backward`` without its checks in Python, which take as long as a small backward.

    The engine itself checks that the gradients match.
    """
    torch.autograd.graph._engine_run_backward(
        tuple(outputs),
        tuple(grads),
        keep_graph,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _find_gradients(
    outputs: Sequence[Tensor | GradientEdge], grads: Sequence[Tensor], inputs: Sequence[Tensor | GradientEdge]
) -> Sequence[Tensor | None]:
    """The gradients with respect to ``inputs``, whose ``.grad`` stay as they are."""
    found: Sequence[Tensor | None] = torch.autograd.graph._engine_run_backward(
        tuple(outputs),
        tuple(grads),
        False,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


def find_input_gradients(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
) -> WeightGradients:
    """Adds the gradients of the leaves ``inputs`` to their ``.grad``; the result does so for the weights.

    If the graph cannot be split, the full backward runs at once, and the result only adds what it found. A
    reentrant checkpoint adds the gradients of its weights itself, so then all are added at once: by the same
    thread, and in the order of the microbatches.
    """
    roots = [get_gradient_edge(tensor) for tensor in outputs]
    if not inputs:
        return _Split([], set(), list(zip(roots, grads)))
    graph = _Graph(roots, [get_gradient_edge(tensor).node for tensor in inputs])
    to_inputs = [pair for pair in zip(roots, grads) if graph.leads_to_inputs[pair[0].node]]
    to_weights = [pair for pair in zip(roots, grads) if not graph.leads_to_inputs[pair[0].node]]
    forks = graph.forks()
    meeting, uses = _meeting_forks(forks, [root for root, _ in to_weights])
    whole = graph.runs_once() or _why_not_twice(forks)
    if meeting and uses > _MOST_USES:
        whole = whole or "a weight is used more than twice, and the sum of its gradients depends on their order"
    if graph.hides_weights():
        run_backward(roots, grads)
        return _Found(whole, [])
    if whole:
        return _run_whole(roots, grads, inputs, graph.leaves(), whole)
    for fork in forks:
        fork.keep_grads()
    if to_inputs:
        _run_pairs(to_inputs, inputs=inputs, keep_graph=bool(forks))
    if forks:
        graph.release(forks)
    return _Split(forks, meeting, to_weights)


def _run_pairs(
    pairs: Sequence[tuple[GradientEdge, Tensor]], inputs: Sequence[Tensor] = (), keep_graph: bool = False
) -> None:
    edges, grads = zip(*pairs, strict=True)
    run_backward(edges, grads, inputs, keep_graph)


class _Fork:
    """A node that leads to inputs, and by other edges only to weights.

    Attributes:
        edges: those that lead only to weights, each with its index among the node's edges.
    """

    def __init__(self, node: Node, edges: list[tuple[int, GradientEdge]]) -> None:
        self.node = node
        self.edges = edges
        self._grads: list[Tensor | None] = []

    def keep_grads(self) -> None:
        """Keeps the gradients that reach the node when the gradients of inputs are computed."""
        kept = self._grads

        def keep(grads: tuple[Tensor | None, ...]) -> None:
            # Our own tensor objects, so that no node assumes it owns the memory and writes to it.
            kept.extend(None if grad is None else grad.detach() for grad in grads)

        self.node.register_prehook(keep)

    def run(self) -> list[tuple[GradientEdge, Tensor]]:
        """The gradients that lead to weights, each with its edge."""
        node: Any = self.node  # torch's stubs do not say that a node can be called
        found = node(*self._grads)
        if not isinstance(found, tuple):
            found = (found,)
        return [(edge, found[index]) for index, edge in self.edges if found[index] is not None]


class _Graph:
    """The nodes between a stage's outputs and its leaves.

    Attributes:
        leads_to_inputs: whether a node leads to inputs; children come before their parents.
    """

    def __init__(self, roots: Iterable[GradientEdge], inputs: Iterable[Node]) -> None:
        self._inputs = set(inputs)
        self.leads_to_inputs: dict[Node, bool] = dict.fromkeys(self._inputs, True)
        self._children: dict[Node, tuple[tuple[Node | None, int], ...]] = {}
        stack = [root.node for root in roots]
        while stack:
            node = stack[-1]
            children = self._children.get(node)
            if node in self.leads_to_inputs:
                stack.pop()
            elif children is None:
                self._children[node] = children = node.next_functions
                stack.extend(child for child, _ in children if child is not None)
            else:
                leads = self.leads_to_inputs
                leads[node] = any(child is not None and leads[child] for child, _ in children)
                stack.pop()

    def forks(self) -> list[_Fork]:
        """The nodes at which the paths to inputs and to weights separate."""
        found = []
        for node in self._trunk():
            edges = [
                (index, GradientEdge(child, number))
                for index, (child, number) in enumerate(self._children[node])
                if child is not None and not self.leads_to_inputs[child]
            ]
            if edges:
                found.append(_Fork(node, edges))
        return found

    def leaves(self) -> list[Tensor]:
        """The leaves that are not inputs."""
        nodes = (node for node in self._children if not self._children[node])
        return [node.variable for node in nodes if hasattr(node, "variable")]

    def hides_weights(self) -> bool:
        """Whether a reentrant checkpoint is in it, which has no graph before it runs backward."""
        return any(getattr(node, "_forward_cls", None) is CheckpointFunction for node in self._children)

    def runs_once(self) -> str:
        """Why the backward of a node must run whole; empty if none must."""
        if self.hides_weights():
            return "a reentrant checkpoint has no graph before it runs backward"
        if any(hasattr(getattr(node, "_forward_cls", None), "compiled_bw") for node in self._children):
            return "a compiled module's backward can run only once: it may reuse the memory that it reads"
        return ""

    def release(self, forks: Iterable[_Fork]) -> None:
        """Frees the tensors saved only for the gradients of inputs; forks keep all nodes below them alive."""
        needed = {fork.node for fork in forks}
        for node in self._trunk():
            if node not in needed:
                for saved in _saved(node):
                    with contextlib.suppress(RuntimeError):  # it holds nothing, or another hook is registered
                        saved.register_hooks(_nothing, _nothing)

    def _trunk(self) -> Iterator[Node]:
        return (node for node, leads in self.leads_to_inputs.items() if leads and node not in self._inputs)


class _Split:
    """A split backward: forks, and outputs that lead only to weights; see ``WeightGradients``."""

    whole = ""

    def __init__(
        self, forks: list[_Fork], meeting: set[_Fork], to_weights: list[tuple[GradientEdge, Tensor]]
    ) -> None:
        """One backward continues from all forks in ``meeting`` and the outputs ``to_weights`` together."""
        self._forks = forks
        self._meeting = meeting
        self._together = to_weights

    def add(self) -> None:
        if self._forks:
            _with_needed([edge for fork in self._forks for _, edge in fork.edges], self._run_forks)
        together, self._together = self._together, []
        if together:
            _run_pairs(together)

    def _run_forks(self, _: Tensor) -> None:
        while self._forks:
            fork = self._forks.pop()
            found = fork.run()
            if fork in self._meeting:
                self._together += found
            elif found:
                _run_pairs(found)  # at once, so that the gradients of all weights are never alive together
        self._meeting = set()


@dataclass(frozen=True)
class _Found:
    """The gradients of weights that a full backward found; see ``WeightGradients``."""

    whole: str
    weights: list[tuple[Tensor, Tensor]]  # and their gradients

    def add(self) -> None:
        while self.weights:
            leaf, grad = self.weights.pop()
            add_gradient(leaf, _own(leaf, grad) if leaf.grad is None else grad)


def _run_whole(
    roots: Sequence[GradientEdge],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    whole: str,
) -> _Found:
    """A full backward that leaves the weights' ``.grad`` alone."""
    found = _find_gradients(roots, grads, (*inputs, *weights))
    for leaf, grad in zip(inputs, found):
        if grad is not None:
            leaf.grad = grad
    # Tensors of our own: autograd may return one tensor for several leaves.
    of_weights = zip(weights, found[len(inputs) :], strict=True)
    return _Found(whole, [(leaf, grad.detach()) for leaf, grad in of_weights if grad is not None][::-1])


def _own(leaf: Tensor, grad: Tensor) -> Tensor:
    """The gradient as autograd would keep it: in memory of its own, and in the leaf's layout."""
    if grad.layout is not torch.strided or is_dtensor(grad):
        return grad
    if grad.stride() != leaf.stride():
        return torch.empty_like(leaf).copy_(grad)
    return grad.clone() if is_shared(grad) else grad


def _why_not_twice(forks: Iterable[_Fork]) -> str:
    """Why a fork must not run once for inputs and again for weights; empty if all may."""
    for fork in forks:
        if hasattr(fork.node, "_forward_cls"):
            return f"{fork.node.name()}, in Python, computes the gradients of inputs and weights at once"
        if any(saved.unpack_hook is not None for saved in _saved(fork.node)):
            return "a saved tensor would be recomputed (checkpoint) or fetched by a hook twice, in I and in W"
    return ""


def _meeting_forks(forks: Sequence[_Fork], roots: Sequence[GradientEdge]) -> tuple[set[_Fork], int]:
    """The forks that reach a node which another fork or root reaches too, and the most edges to one node."""
    found: set[_Fork] = set()
    uses: Counter[tuple[Node, int]] = Counter()
    owners: dict[Node, _Fork | None] = {}
    begins: list[tuple[_Fork | None, list[tuple[Node, int]]]] = [
        (None, [(root.node, root.output_nr) for root in roots])
    ]
    begins += [(fork, [(edge.node, edge.output_nr) for _, edge in fork.edges]) for fork in forks]
    for owner, stack in begins:
        while stack:
            node, number = stack.pop()
            uses[node, number] += 1
            if node not in owners:
                owners[node] = owner
                stack += [(child, index) for child, index in node.next_functions if child is not None]
            elif owners[node] is not owner:
                found |= {fork for fork in (owners[node], owner) if fork is not None}
    return found, max(uses.values(), default=0)


def _with_needed(edges: Sequence[GradientEdge], call: Callable[[Tensor], None]) -> None:
    """Runs ``call``; nodes that it calls compute the gradients along ``edges`` and no others.

    It runs inside a backward: the engine's list of needed gradients holds for every node in its thread.
    """
    start = torch.zeros((), device="cpu", requires_grad=True)
    start.register_hook(call)
    _find_gradients((start,), (torch.zeros((), device="cpu"),), (start, *edges))


def _saved(node: Node) -> Iterator[Any]:
    """The holders of the tensors that a node saved."""
    for name in _names_of_saved(type(node)):
        saved = getattr(node, name)
        yield from saved if isinstance(saved, tuple) else (saved,)


@functools.cache
def _names_of_saved(kind: type[Node]) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _nothing(_: Any) -> None:
    return None
