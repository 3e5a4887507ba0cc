"""Measures the memory that stages keep for one microbatch, from its forward until its backward."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.tensors import dense_parts

_GPU_BLOCK = 512  # bytes; torch's allocator gives multiples of it


class ActivationMemory:
    """The bytes that are alive when an ``F`` has ended and were not before it, by stage.

    They are the storages that the ``F`` has made and that something still holds, each once, and those of what
    the stage was given by others. Parameters, buffers and the batch are older than the ``F``, so they do not
    count. What activation checkpointing keeps does; what it recomputes in a ``B`` does not, nor does other
    memory that a task needs only while it runs.
    """

    def __init__(self, num_stages: int) -> None:
        self._most = [0] * num_stages
        self._running: dict[int, _Storages] = {}  # by stage, each of which runs one F at a time

    @property
    def by_stage(self) -> list[int]:
        """Bytes of the largest microbatch so far; 0 for a stage that has not run here."""
        return list(self._most)

    @contextlib.contextmanager
    def of_forward(self, stage: int) -> Iterator[None]:
        """Inside it, ``stage`` runs one ``F``."""
        made = self._running[stage] = _Storages()
        try:
            with _Operators(made):
                yield
        finally:
            del self._running[stage]
        self._most[stage] = max(self._most[stage], made.alive())

    def given(self, stage: int, value: Any) -> None:
        """What other stages have given the running ``F`` of ``stage``: any pytree."""
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, Tensor):
                self._running[stage].add(tensor)

    def computed(self, stage: int) -> None:
        """The running ``F`` of ``stage`` only sends from here on; messages on their way do not count."""
        self._running[stage].complete = True

    @staticmethod
    def of_step() -> contextlib.AbstractContextManager[Any]:
        """Measure steps in it. Compiled code runs eagerly there: its operators would not be seen."""
        # Without it torch.compile would give up, for good, on what it first meets in a dispatch mode.
        if "torch._dynamo" not in sys.modules:
            return contextlib.nullcontext()
        return torch.compiler.set_stance("force_eager")


class _Storages:
    """Storages, known by weak references, which keep their numbers from being used again."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}
        self.complete = False  # no more are added
        self._opaque = 0  # bytes of tensors without a storage, which count as kept

    def add(self, tensor: Tensor) -> None:
        if self.complete:
            return
        for part in dense_parts(tensor):
            try:
                storage = part.untyped_storage()
            except (NotImplementedError, RuntimeError):
                self._opaque += part.numel() * part.itemsize
                continue
            if storage._cdata not in self._known:
                self._known[storage._cdata] = StorageWeakRef(storage)

    def alive(self) -> int:
        """Bytes of those that something holds."""
        total = self._opaque
        for known in self._known.values():
            storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(known.cdata)
            total += 0 if storage is None else _bytes(storage)
        return total


class _Operators(TorchDispatchMode):
    """Notes the storages that operators make."""

    def __init__(self, made: _Storages) -> None:
        super().__init__()
        self._made = made

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        # lift_fresh returns its argument, which torch.tensor has made out of sight.
        older = set() if operator is torch.ops.aten.lift_fresh.default else _storages_of((args, kwargs))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not older.intersection(_storages_of(tensor)):
                self._made.add(tensor)
        return result


def _storages_of(value: Any) -> set[int]:
    found = set()
    for tensor in pytree.tree_leaves(value):
        if isinstance(tensor, Tensor):
            for part in dense_parts(tensor):
                with contextlib.suppress(NotImplementedError, RuntimeError):
                    found.add(part.untyped_storage()._cdata)
    return found


def _bytes(storage: torch.UntypedStorage) -> int:
    nbytes = storage.nbytes()
    return nbytes if storage.device.type != "cuda" else -(-nbytes // _GPU_BLOCK) * _GPU_BLOCK
