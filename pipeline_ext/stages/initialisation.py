"""Gives tensors on the meta device memory and values."""

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InvalidArgument
from ..processes.connections import Connections, own_part
from .wrapped import reduced_in

Place = tuple[dict[str, Any], str]  # where a module holds a tensor: the table, and the name in it


class Initialise(Protocol):
    """``initialise`` of a certain model."""

    def __call__(self, *, modules: Sequence[nn.Module], replicas: Connections | None) -> None: ...


def initialise(
    within: nn.Module | None = None,
    around: Sequence[nn.Module] = (),
    *,
    modules: Sequence[nn.Module],
    replicas: Connections | None,
) -> None:
    """Gives parameters and buffers on the meta device memory and values, the same in all ``replicas``.

    Layers are initialised from the inside out, as when a model is made: by the ``_init_weights`` of the
    innermost model around them, as those of transformers have, and by ``reset_parameters`` where that leaves
    something out. Tensors of other processes stay on the meta device, where initialising them does nothing.

    Args:
        within: the model that ``modules`` are of, if it is one module.
        around: modules of it of which only the buffers are needed.
        modules: those of this process.
        replicas: the processes with the same modules.

    Raises:
        InvalidArgument: for a tensor that nothing initialises, or that is no parameter and no buffer.
    """
    roots = [*([] if within is None else [within]), *modules]
    owners = list(dict.fromkeys(owner for root in roots for owner in root.modules()))
    wanted = {t for module in modules for t in (*module.parameters(), *module.buffers()) if t.is_meta}
    wanted |= {t for module in around for t in module._buffers.values() if t is not None and t.is_meta}
    _refuse_plain_tensors([*around, *(owner for module in modules for owner in module.modules())])
    made = {tensor: _empty_like(tensor) for tensor in wanted}
    for table, name in _places(owners, wanted):
        table[name] = made[table[name]]
    if made:
        new = set(made.values())
        given = {t for owner in owners for t in (*owner._parameters.values(), *owner._buffers.values())}
        with_values = {t for t in given - new if t is not None and not t.is_meta}
        hidden = [*_places(owners, with_values), *_repeated(owners, new)]
        seed = int(torch.randint(1 << 62, ()))
        if within is None and dist.is_initialized():
            seed += dist.get_rank() << 32  # other processes number other layers
        with _hidden(hidden), torch.no_grad(), torch.random.fork_rng(devices=[]), _Writes() as writes:
            _Initialising(new, writes, seed).run(roots)
        _refuse_unwritten(owners, new, writes)
    if replicas is not None:
        _make_equal(modules, replicas)


def _places(owners: Iterable[nn.Module], tensors: Collection[Tensor]) -> Iterator[Place]:
    """Where modules hold these tensors, each place once: modules may share a table."""
    tables = {id(table): table for owner in owners for table in (owner._parameters, owner._buffers)}
    for table in tables.values():
        for name, tensor in list(table.items()):
            if tensor is not None and tensor in tensors:
                yield table, name


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="cpu")
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, tensor.requires_grad)
        empty.__dict__.update(tensor.__dict__)
    return empty


def _repeated(owners: Iterable[nn.Module], new: Collection[Tensor]) -> Iterator[Place]:
    """The places of tied tensors, except the first: models are initialised before they are tied."""
    seen: set[Tensor] = set()
    for table, name in _places(owners, new):
        if table[name] in seen:
            yield table, name
        seen.add(table[name])


@contextlib.contextmanager
def _hidden(places: Iterable[Place]) -> Iterator[None]:
    """Inside it, the tensors in these places are on the meta device, so that nothing overwrites them."""
    kept = [(table, name, table[name]) for table, name in places]
    for table, name, tensor in kept:
        on_meta = tensor.detach().to("meta")
        table[name] = (
            nn.Parameter(on_meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else on_meta
        )
    try:
        yield
    finally:
        for table, name, tensor in kept:
            table[name] = tensor


class _Writes(TorchDispatchMode):
    """Counts the elements that are written, by memory."""

    def __init__(self) -> None:
        super().__init__()
        self._elements: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for position, argument in enumerate(operator._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[position] if position < len(args) else (kwargs or {}).get(argument.name)
                for tensor in pytree.tree_leaves(given):
                    if isinstance(tensor, Tensor):
                        key = _memory(tensor)
                        self._elements[key] = self._elements.get(key, 0) + own_part(tensor).numel()
        return result

    def filled(self, tensor: Tensor) -> bool:
        """Whether all of a tensor can have been written."""
        return self._elements.get(_memory(tensor), 0) >= own_part(tensor).numel()


def _memory(tensor: Tensor) -> int:
    return int(own_part(tensor).untyped_storage()._cdata)


class _Initialising:
    """The initialisation of modules and what is inside them.

    Each module draws from a seed of its own, so that its values do not depend on which others are in this
    process, and all processes' generators go on alike.
    """

    def __init__(self, new: Collection[Tensor], writes: _Writes, seed: int) -> None:
        self._seed = seed
        self._new = new
        self._writes = writes
        self._seen: dict[nn.Module, bool] = {}  # whether it holds any of the new tensors

    def run(self, roots: Iterable[nn.Module]) -> None:
        for root in roots:
            self._visit(root, None)

    def _visit(self, module: nn.Module, by: Callable[[nn.Module], None] | None) -> bool:
        """Initialises what is inside a module, then itself; says whether it holds new tensors."""
        if module in self._seen:
            return self._seen[module]
        self._seen[module] = False
        number = len(self._seen)
        by = _initialiser(module) or by
        inside = [self._visit(child, by) for child in module.children()]
        own = list(_places([module], self._new))
        self._seen[module] = bool(own) or any(inside)
        if self._seen[module]:
            torch.default_generator.manual_seed(self._seed + number)
            self._initialise(module, by, own)
        return self._seen[module]

    def _initialise(self, module: nn.Module, by: Callable[[nn.Module], None] | None, own: list[Place]) -> None:
        if by is not None:
            by(module)
        if not all(self._writes.filled(table[name]) for table, name in own):
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if callable(reset):
                reset()
                if by is not None:
                    by(module)


def _initialiser(model: nn.Module) -> Callable[[nn.Module], None] | None:
    """The model's own function that initialises a module inside it."""
    found = getattr(model, "_init_weights", None)
    if not callable(found):
        return None
    try:
        inspect.signature(found).bind(model)
    except (TypeError, ValueError):  # it takes something else
        return None
    return found


def _refuse_unwritten(owners: Iterable[nn.Module], new: Collection[Tensor], writes: _Writes) -> None:
    for owner in owners:
        left = [
            name
            for table in (owner._parameters, owner._buffers)
            for name, tensor in table.items()
            if tensor is not None and tensor in new and not writes.filled(tensor)
        ]
        if left:
            raise InvalidArgument(
                f"{type(owner).__name__} has {', '.join(left)} on the meta device and no reset_parameters() "
                "that could initialise them; give it one, or make the stage on the CPU"
            )


def _refuse_plain_tensors(modules: Iterable[nn.Module]) -> None:
    """Refuses tensors on the meta device in attributes: nothing would give them values."""
    for module in modules:
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise InvalidArgument(
                    f"{type(module).__name__} keeps a tensor on the meta device in its attribute {name}, which "
                    "nothing can initialise; register it as a buffer, or make the stage on the CPU"
                )


def _make_equal(modules: Sequence[nn.Module], replicas: Connections) -> None:
    """Gives every replica the parameters and buffers of the first, except what wrapped stages reduce."""
    own = reduced_in(modules)
    with torch.no_grad():
        for tensor in dict.fromkeys(t for m in modules for t in (*m.parameters(), *m.buffers())):
            if tensor not in own:
                replicas.make_equal(tensor)
