"""Follows where the data of tensors comes from, by watching every operator.

Each tensor's memory has a set of labels: of an input, a parameter, the result of a call. What an operator makes
or writes to gets the labels of all that it read. Autograd's graph would not do: it ends at integers, masks and
whatever is detached.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

Labels = int  # a set, as bits

READS_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_TO_PYTHON = {
    Tensor.numpy,
    Tensor.tolist,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
}


class Memory:
    """The labels of all tensors, by their memory."""

    def __init__(self) -> None:
        self._labels: dict[int, Labels] = {}
        self._kept: dict[int, Any] = {}  # keeps addresses from being used again; not the memory

    def of(self, tensor: Tensor) -> Labels:
        return self._labels.get(self._key(tensor), 0)

    def knows(self, tensor: Tensor) -> bool:
        return self._key(tensor) in self._labels

    def shares(self, tensor: Tensor, others: Iterable[Tensor]) -> bool:
        """Whether it has the memory of one of the others."""
        key = self._key(tensor)
        return any(self._key(other) == key for other in others)

    def add(self, tensor: Tensor, labels: Labels) -> None:
        key = self._key(tensor)
        self._labels[key] = self._labels.get(key, 0) | labels

    def put(self, tensor: Tensor, labels: Labels) -> None:
        self._labels[self._key(tensor)] = labels

    def _key(self, tensor: Tensor) -> int:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse
            self._kept.setdefault(id(tensor), tensor)
            return id(tensor)
        key = int(storage._cdata)
        if key not in self._kept:
            self._kept[key] = StorageWeakRef(storage)
        return key


class Watcher(Protocol):
    """Is told of operators."""

    def made(self, read: Labels) -> Labels:
        """The labels of what an operator makes that has read these."""
        ...

    def looked_at(self, read: Labels) -> None:
        """Python has looked at data with these labels, or a shape depends on it."""
        ...

    def wrote(self, tensor: Tensor) -> None:
        """An operator has written to a tensor."""
        ...

    def drew(self, operator: str) -> None:
        """An operator has drawn random numbers where its tensors are."""
        ...


@contextlib.contextmanager
def following(memory: Memory, watcher: Watcher) -> Iterator[None]:
    """Inside it, labels follow the data."""
    with _Functions(memory, watcher), _Operators(memory, watcher):
        yield


class _Operators(TorchDispatchMode):
    def __init__(self, memory: Memory, watcher: Watcher) -> None:
        super().__init__()
        self._memory = memory
        self._watcher = watcher

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = 0
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            read |= self._memory.of(tensor)
        result = operator(*args, **kwargs)
        made = self._watcher.made(read)
        tags = getattr(operator, "tags", ())
        if any(tag in READS_DATA for tag in tags) and not _indexes_by_numbers(operator, args):
            self._watcher.looked_at(read)
        if torch.Tag.nondeterministic_seeded in tags and (inputs or any(t.dim() for t in _tensors(result))):
            self._watcher.drew(str(operator))
        for tensor in written(operator, args, kwargs):
            self._watcher.wrote(tensor)
            self._memory.add(tensor, made)
        for tensor in _tensors(result):
            if not self._memory.shares(tensor, inputs):  # a view has the labels of its memory
                self._memory.add(tensor, made)
        return result


class _Functions(TorchFunctionMode):
    def __init__(self, memory: Memory, watcher: Watcher) -> None:
        super().__init__()
        self._memory = memory
        self._watcher = watcher

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _TO_PYTHON and isinstance(args[0], Tensor):
            self._watcher.looked_at(self._memory.of(args[0]))
        return function(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _indexes_by_numbers(operator: Any, args: tuple) -> bool:
    """Whether it is x[i] with i of integers, whose shape does not depend on data."""
    if operator is not torch.ops.aten.index.Tensor:
        return False
    return not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def written(operator: Any, args: tuple, kwargs: dict[str, Any]) -> Iterable[Tensor]:
    """The tensors that an operator writes to."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(given)
