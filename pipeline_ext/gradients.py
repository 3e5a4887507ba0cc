"""Adding one stage's parameter gradients to ``.grad``, microbatch after microbatch.

The sums are those of plain autograd: the first gradient is kept, each further one is added in place.
"""

import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Accumulator:
    """Sums the gradients of one stage's parameters.

    What other stages may use too is summed apart and merged when the step has ended, since two stages'
    threads may not add to one tensor. After ``close`` nothing is added any more: a thread that was given
    up as lost cannot touch ``.grad``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._own: frozenset[Tensor] = frozenset()
        self._apart: dict[Tensor, Tensor] = {}

    def begin(self, own: frozenset[Tensor]) -> None:
        """Starts a step in which only this stage adds to the tensors of ``own``."""
        self._own = own
        self._apart = {}

    def add(
        self, leaves: Sequence[Tensor], grads: Sequence[Tensor | None], in_use: Iterable[Tensor]
    ) -> None:
        """Adds ``grads`` to the gradients of ``leaves``.

        Args:
            leaves: parameters, or other leaf tensors that the stage's graph reached.
            grads: of the same length; None where a leaf was not reached.
            in_use: tensors of which others hold the memory (gradients sent on, or received).
        """
        have, new = [], []
        taken = {t.untyped_storage().data_ptr() for t in in_use if t.layout is torch.strided}
        reached = []
        with self._lock:
            if self._closed:
                return
            for leaf, grad in zip(leaves, grads):
                if grad is None:
                    continue
                apart = leaf not in self._own
                if not apart:
                    reached.append(leaf)
                old = self._apart.get(leaf) if apart else leaf.grad
                if old is not None:
                    have.append(old)
                    new.append(grad)
                elif apart:
                    self._apart[leaf] = _owned(grad, leaf, taken)
                else:
                    leaf.grad = _owned(grad, leaf, taken)
            if have:
                torch._foreach_add_(have, new)
        for leaf in reached:
            _call_hooks(leaf)

    def merge(self) -> None:
        """Adds what was summed apart to ``.grad``. Called when the step has ended."""
        for leaf, grad in self._apart.items():
            if leaf.grad is None:
                leaf.grad = grad
            else:
                leaf.grad.add_(grad)
            _call_hooks(leaf)
        self._apart = {}

    def close(self) -> None:
        """From now on ``add`` does nothing."""
        with self._lock:
            self._closed = True


def _owned(grad: Tensor, leaf: Tensor, taken: set[int]) -> Tensor:
    """``grad`` itself where its memory is ours alone and laid out as ``leaf``, otherwise a copy.

    ``taken`` holds the addresses of memory that is in use, and is added to.
    """
    if grad.layout is not torch.strided or leaf.layout is not torch.strided:
        return grad.clone()
    storage = grad.untyped_storage()
    address = storage.data_ptr()
    # A gradient and the base it is a view of each count once, the storage object here once more.
    uses = torch._C._storage_Use_Count(storage._cdata) - (2 if grad._is_view() else 1)
    if (
        address in taken
        or uses > 1
        or grad.stride() != leaf.stride()
        or storage.nbytes() != grad.nbytes
    ):
        return torch.empty_like(leaf).copy_(grad)
    taken.add(address)
    return grad


def _call_hooks(leaf: Tensor) -> None:
    """What ``register_post_accumulate_grad_hook`` asked for; autograd.grad does not."""
    for hook in (leaf._post_accumulate_grad_hooks or {}).values():
        hook(leaf)


def leaves_of_graph(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that a backward from ``tensors`` would reach."""
    leaves, seen = [], set()
    pending = [t.grad_fn for t in tensors if t.grad_fn is not None]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch._C._functions.AccumulateGrad):
            leaves.append(node.variable)
        pending.extend(after for after, _ in node.next_functions if after is not None)
    return leaves
