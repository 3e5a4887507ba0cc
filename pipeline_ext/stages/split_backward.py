"""The backward of a stage in two: first the gradients of its inputs, later those of its weights.

That a graph comes apart where the ways to inputs and to weights part is an idea of zero-bubble schedules (Qi et
al., Zero Bubble Pipeline Parallelism, ICLR 2024), which torch.distributed.pipelining (2.13, ``_backward.py``)
carries out for modules in general. There each group of weights takes a backward of its own, which looks through
the graph down to the inputs again. Here the nodes at which the ways part, the forks, are run once more and
nothing else on the way to inputs is. What makes that possible is that autograd's engine tells a node which of
its gradients are asked for: those that lead to weights.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction

# Of a weight, by several forks. In which order so many gradients are added up does not change the sum.
_MOST_USES = 2


class WeightGradients(Protocol):
    """What is left of a backward once the gradients of the inputs are there.

    Attributes:
        whole: why all of it has run and only the adding is left; empty where it came apart.
    """

    whole: str

    def add(self) -> None:
        """Adds the gradients of the weights to their ``.grad``, and lets go of all they are made from."""


def run_backward(
    outputs: Sequence[Tensor | GradientEdge],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor] = (),
    keep_graph: bool = False,
) -> None:
    """``torch.autograd.backward`` without its checks in Python, which take as long as a small backward.

    The engine itself checks that the gradients fit.
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


def find_input_gradients(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Callable[[], Iterable[Tensor]],
    check: Callable[[], None],
) -> WeightGradients:
    """Adds the gradients of leaves ``inputs`` to their ``.grad``; what is returned does so for the weights.

    A backward that does not come apart runs whole, and the weights' gradients are put by. For that ``weights``
    lists those that the graph itself may not show; ``check`` raises an error where the caller has been given up
    meanwhile and may touch no ``.grad`` any more.
    """
    roots = [get_gradient_edge(tensor) for tensor in outputs]
    if not inputs:
        return _Apart([], set(), list(zip(roots, grads)))
    graph = _Graph(roots, [get_gradient_edge(tensor).node for tensor in inputs])
    above = [pair for pair in zip(roots, grads) if graph.leads_to_inputs[pair[0].node]]
    beside = [pair for pair in zip(roots, grads) if not graph.leads_to_inputs[pair[0].node]]
    forks = graph.forks()
    meeting, uses = _that_meet(forks, [root for root, _ in beside])
    whole = graph.hides_weights() or _not_twice(forks)
    if meeting and uses > _MOST_USES:
        whole = whole or "a weight is used more than twice, and the sum of its gradients depends on their order"
    if whole:
        leaves = dict.fromkeys([*weights(), *graph.leaves()])
        return _run_whole(roots, grads, leaves, check, whole)
    for fork in forks:
        fork.keep_grads()
    if above:
        run_backward(*zip(*above), inputs=inputs, keep_graph=bool(forks))
    if forks:
        graph.release(forks)
    return _Apart(forks, meeting, beside)


class _Fork:
    """A node that leads to inputs, and on other ways to weights alone.

    Attributes:
        ways: those to weights, each with its place among the node's.
    """

    def __init__(self, node: Node, ways: list[tuple[int, GradientEdge]]) -> None:
        self.node = node
        self.ways = ways
        self._grads: list[Tensor | None] = []

    def keep_grads(self) -> None:
        """Keeps what the node is given when the gradients of inputs are computed."""
        kept = self._grads

        def keep(grads: tuple[Tensor | None, ...]) -> None:
            # A tensor of our own: nobody then takes the memory for his alone, and writes to it.
            kept.extend(None if grad is None else grad.detach() for grad in grads)

        self.node.register_prehook(keep)

    def run(self) -> list[tuple[GradientEdge, Tensor]]:
        """The gradients that go to weights, and where."""
        found = self.node(*self._grads)
        if not isinstance(found, tuple):
            found = (found,)
        return [(edge, found[place]) for place, edge in self.ways if found[place] is not None]


class _Graph:
    """The nodes between a stage's outputs and its leaves.

    Attributes:
        leads_to_inputs: of each node, whether it does; children before their parents.
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
        """The nodes at which the ways to inputs and to weights part."""
        found = []
        for node in self._trunk():
            ways = [
                (place, GradientEdge(child, number))
                for place, (child, number) in enumerate(self._children[node])
                if child is not None and not self.leads_to_inputs[child]
            ]
            if ways:
                found.append(_Fork(node, ways))
        return found

    def leaves(self) -> list[Tensor]:
        """Those that are no inputs."""
        nodes = (node for node in self._children if not self._children[node])
        return [node.variable for node in nodes if hasattr(node, "variable")]

    def hides_weights(self) -> str:
        """Why the graph does not show what its backward does; empty where it does."""
        for node in self._children:
            function = getattr(node, "_forward_cls", None)
            if function is CheckpointFunction:
                return "a reentrant checkpoint has no graph before it runs backward"
            if function is not None and hasattr(function, "compiled_bw"):
                return "a compiled module's backward runs once, and may give away the memory that it reads"
        return ""

    def release(self, forks: Iterable[_Fork]) -> None:
        """Lets go of the tensors saved for the gradients of inputs alone; forks hold all nodes below them."""
        needed = {fork.node for fork in forks}
        for node in self._trunk():
            if node not in needed:
                for saved in _saved(node):
                    try:
                        saved.register_hooks(_nothing, _nothing)
                    except RuntimeError:
                        pass  # it holds nothing, or what a hook of others holds

    def _trunk(self) -> Iterator[Node]:
        return (node for node, leads in self.leads_to_inputs.items() if leads and node not in self._inputs)


class _Apart:
    """Forks, and outputs that lead to weights alone; see ``WeightGradients``."""

    whole = ""

    def __init__(
        self, forks: list[_Fork], meeting: set[_Fork], beside: list[tuple[GradientEdge, Tensor]]
    ) -> None:
        """What the forks ``meeting`` find goes on together, with the gradients of the outputs ``beside``."""
        self._forks = forks
        self._meeting = meeting
        self._together = beside

    def add(self) -> None:
        if self._forks:
            _asked_for([edge for fork in self._forks for _, edge in fork.ways], self._run_forks)
        together, self._together = self._together, []
        if together:
            run_backward(*zip(*together))

    def _run_forks(self, _: Tensor) -> None:
        while self._forks:
            fork = self._forks.pop()
            found = fork.run()
            if fork in self._meeting:
                self._together += found
            elif found:
                run_backward(*zip(*found))  # at once: the gradients of all weights are never all there
        self._meeting = set()


class _PutBy(NamedTuple):
    """Gradients that a whole backward has found; see ``WeightGradients``."""

    whole: str
    found: list[tuple[Tensor, Tensor]]  # weights and gradients

    def add(self) -> None:
        with torch.no_grad():
            for leaf, grad in self.found:
                if leaf.grad is None:
                    leaf.grad = grad
                elif leaf.grad.is_sparse and not grad.is_sparse:
                    leaf.grad = grad + leaf.grad
                else:
                    leaf.grad += grad
        self.found.clear()


def _run_whole(
    roots: Sequence[GradientEdge],
    grads: Sequence[Tensor],
    leaves: Iterable[Tensor],
    check: Callable[[], None],
    whole: str,
) -> _PutBy:
    before = [(leaf, leaf.grad) for leaf in leaves]
    for leaf, _ in before:
        leaf.grad = None
    run_backward(roots, grads)
    check()
    found = [(leaf, leaf.grad) for leaf, _ in before if leaf.grad is not None]
    for leaf, grad in before:
        leaf.grad = grad
    return _PutBy(whole, found)


def _not_twice(forks: Iterable[_Fork]) -> str:
    """Why a fork is not to be run for inputs, and again for weights; empty where all may be."""
    for fork in forks:
        if hasattr(fork.node, "_forward_cls"):
            return f"{fork.node.name()}, in Python, computes the gradients of inputs and weights at once"
        if any(saved.unpack_hook is not None for saved in _saved(fork.node)):
            return "what a weight's gradient needs is recomputed (checkpoint) or fetched by a hook, both times"
    return ""


def _that_meet(forks: Sequence[_Fork], roots: Sequence[GradientEdge]) -> tuple[set[_Fork], int]:
    """The forks whose ways lead to a node that others' do, too; and how many edges lead to the same at most."""
    found: set[_Fork] = set()
    uses: Counter[tuple[Node, int]] = Counter()
    owners: dict[Node, _Fork | None] = {}
    ways = [(None, [(root.node, root.output_nr) for root in roots])]
    ways += [(fork, [(edge.node, edge.output_nr) for _, edge in fork.ways]) for fork in forks]
    for owner, stack in ways:
        while stack:
            node, number = stack.pop()
            uses[node, number] += 1
            if node not in owners:
                owners[node] = owner
                stack += [edge for edge in node.next_functions if edge[0] is not None]
            elif owners[node] is not owner:
                found |= {fork for fork in (owners[node], owner) if fork is not None}
    return found, max(uses.values(), default=0)


def _asked_for(edges: Sequence[GradientEdge], call: Callable[[Tensor], None]) -> None:
    """Makes a call in which nodes, when called, compute what goes along ``edges`` and nothing else.

    What the engine is asked for holds for every node that runs in its thread meanwhile.
    """
    start = torch.zeros((), device="cpu", requires_grad=True)
    start.register_hook(call)
    torch.autograd.graph._engine_run_backward(
        (start,),
        (torch.zeros((), device="cpu"),),
        False,
        False,
        (start, *edges),
        allow_unreachable=True,
        accumulate_grad=False,
    )


def _saved(node: Node) -> Iterator[Any]:
    """What holds the tensors that a node has saved."""
    for name in _names_of_saved(type(node)):
        saved = getattr(node, name)
        yield from saved if isinstance(saved, tuple) else (saved,)


@functools.cache
def _names_of_saved(kind: type[Node]) -> list[str]:
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _nothing(_: Any) -> None:
    return None
