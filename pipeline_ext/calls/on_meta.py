"""Runs a model on the meta device, where tensors have shapes and no values.

Models look at values of masks and positions as they choose their way, and these come from the inputs alone. So
what comes from inputs with values alone is computed on the CPU too, and looks at it are answered.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InvalidArgument, PipelineError
from ..microbatches.cutting import Arguments
from ..microbatches.opaque import held_tensors
from .labels import READS_DATA, written

_LARGEST = 1 << 24  # elements of a value that is computed
_TAKES_BFLOAT16 = {torch.ops.aten._grouped_mm.default}  # on meta, as on GPUs; on CPUs other types too


class OnMeta:
    """The runs of one model on the meta device."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values = _Values()

    def arguments(self, given: Arguments) -> Arguments:
        """The arguments on the meta device; their values, if they have any, stay known."""
        return pytree.tree_map_only(Tensor, self._values.on_meta, given)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside it the model runs. Raises InvalidArgument for code that needs values of weights."""
        before = [(module, dict(module.__dict__)) for module in self._model.modules()]
        try:
            with _Operators(self._values):
                yield
            for module, attributes in before:
                _forget_meta(module.__dict__, attributes)
        except PipelineError:
            raise
        except Exception as error:
            raise InvalidArgument(
                f"the forward of {type(self._model).__name__} cannot run on the meta device"
                f"{_place(error)}, with {type(error).__name__}: {error}; {_INSTEAD}"
            ) from error


_INSTEAD = (
    "if sample= is on the meta device, give one with values; if the code looks at values that depend on "
    "weights, make the model on the CPU in each process, which keeps only its own stages of it"
)


class _Values:
    """Values of tensors on the meta device, by their memory: of each there is a twin on the CPU."""

    def __init__(self) -> None:
        self._twins: dict[int, tuple[StorageWeakRef, torch.UntypedStorage]] = {}
        self._checked = 64  # twins, when those that are not used any more were last removed

    def on_meta(self, tensor: Tensor) -> Tensor:
        """The tensor on the meta device."""
        if tensor.is_meta:
            return tensor
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        made.requires_grad_(tensor.requires_grad)
        self.put(made, tensor.detach().cpu())
        return made

    def of(self, tensor: Tensor) -> Tensor | None:
        """The values of a tensor, which are its own memory; None if they are not known."""
        if not tensor.is_meta:
            return tensor
        _, twin = self._twins.get(_key(tensor), (None, None))
        if twin is None:
            return None
        own = torch.empty(0, dtype=tensor.dtype)
        return own.set_(twin, tensor.storage_offset(), tensor.shape, tensor.stride())

    def put(self, tensor: Tensor, value: Tensor) -> None:
        """``value`` is that of a tensor whose memory is new."""
        storage = tensor.untyped_storage()
        if tensor.numel() > _LARGEST or storage.nbytes() > _LARGEST * tensor.element_size():
            return
        if len(self._twins) >= 2 * self._checked:
            self._twins = {key: kept for key, kept in self._twins.items() if not kept[0].expired()}
            self._checked = max(64, len(self._twins))
        self._twins[_key(tensor)] = StorageWeakRef(storage), torch.UntypedStorage(storage.nbytes())
        own = self.of(tensor)
        assert own is not None
        own.copy_(value)

    def forget(self, tensor: Tensor) -> None:
        self._twins.pop(_key(tensor), None)


def _forget_meta(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Puts a module's attributes back if the forward has left tensors in them, as masks for later forwards."""
    changed = [name for name, value in now.items() if before.get(name, now) is not value]
    if any(tensor.is_meta for name in changed for tensor in held_tensors(now[name])):
        for name in changed:
            now.pop(name)
            if name in before:
                now[name] = before[name]


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Operators(TorchDispatchMode):
    """Runs each operator on the meta device, and on values where all that it reads has some."""

    def __init__(self, values: _Values) -> None:
        super().__init__()
        self._values = values

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        makes_meta = str(kwargs.get("device")) == "meta"
        if not makes_meta and not any(tensor.is_meta for tensor in given):
            return operator(*args, **kwargs)
        values = [self._values.of(tensor) for tensor in given]
        known = torch.Tag.nondeterministic_seeded not in operator.tags and all(v is not None for v in values)
        computed = None
        if known:
            its_args, its_kwargs = pytree.tree_map_only(Tensor, self._values.of, (args, kwargs))
            computed = operator(*its_args, **({**its_kwargs, "device": "cpu"} if makes_meta else its_kwargs))
            if "device" in kwargs and not makes_meta:
                return computed  # it leaves the meta device
        if known and READS_DATA & set(operator.tags):
            return pytree.tree_map_only(Tensor, self._values.on_meta, computed)
        found = self._on_meta(operator, args, kwargs, known)
        if known:
            for tensor, value in zip(pytree.tree_leaves(found), pytree.tree_leaves(computed)):
                if isinstance(tensor, Tensor) and tensor.is_meta and self._values.of(tensor) is None:
                    self._values.put(tensor, value)
        return found

    def _on_meta(self, operator: Any, args: Any, kwargs: Any, known: bool) -> Any:
        changed = list(written(operator, args, kwargs))
        for tensor in () if known else changed:
            if not tensor.is_meta:
                raise RuntimeError(f"{operator} writes what has no value into a tensor that has")
            self._values.forget(tensor)
        if not changed:
            args, kwargs = pytree.tree_map_only(Tensor, self._values.on_meta, (args, kwargs))
        if operator in _TAKES_BFLOAT16 and args[0].dtype is not torch.bfloat16:
            a, b, *rest = args
            return operator(a.bfloat16(), b.bfloat16(), *rest, **kwargs).to(a.dtype)
        return operator(*args, **kwargs)


def _place(error: Exception) -> str:
    """Where in the model's code it was raised."""
    of_torch = Path(torch.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if of_torch not in path.parents and path.parent != Path(__file__).parent:
            return f": it fails at {path.name}:{frame.lineno}, {frame.line}"
    return ""
