"""The calls of a model's units in one forward, and what each needs of those before."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..base.flat import is_flat
from ..errors import InvalidArgument, PipelineError
from ..microbatches.cutting import input_name
from ..stages.parameter_view import prepare
from .routing import not_here, route
from .values import Leaf, Missing, is_elsewhere, without_memory

INPUTS = -1  # stands for a call: the arguments of the forward


class Source(NamedTuple):
    """A tensor that may be needed later: part ``part`` of what call ``call`` leaves."""

    call: int
    part: int


class Held(NamedTuple):
    """A parameter, and the module that holds it."""

    owner: nn.Module
    name: str


@dataclass(eq=False)
class Effect:
    """A value that a call leaves other than by its result.

    Attributes:
        kind: "hooks": what an inner module with hooks returned; "attribute" of an inner module; "entry" of a
            list or dict among the arguments.
        module: the inner module.
        place: hooks: which call of the inner module; attribute: its name; entry: its path in the arguments.
        leaves, spec: the value.
        first: the number of its first part among the call's.
    """

    kind: str
    module: nn.Module | None
    place: Any
    leaves: list[Leaf]
    spec: pytree.TreeSpec
    first: int


@dataclass(eq=False)
class CallOfUnit:
    """One call of a unit.

    Attributes:
        leaves, spec: its result.
        effects: what else it leaves.
        needs: what it reads of the inputs and of earlier calls.
        parameters: those that it gets by code around units, or that belong to another unit.
        draws: whether it draws random numbers.
    """

    unit: nn.Module
    name: str
    leaves: list[Leaf] = field(default_factory=list)
    spec: pytree.TreeSpec | None = None
    effects: list[Effect] = field(default_factory=list)
    needs: frozenset[Source] = frozenset()
    parameters: list[Held] = field(default_factory=list)
    draws: bool = False

    @functools.cached_property
    def is_one_tensor(self) -> bool:
        """Whether a tensor is all that it leaves."""
        assert self.spec is not None
        return self.spec.is_leaf() and self.leaves[0].kind == "tensor" and not self.effects

    def parts(self) -> int:
        """The number of leaves of its result and of its effects."""
        return len(self.leaves) + sum(len(effect.leaves) for effect in self.effects)


@dataclass(eq=False)
class Program:
    """A model as a sequence of calls.

    Attributes:
        calls: in the order of execution.
        output: what the code after the last call needs.
        structure: of the sample's arguments.
        plain: the leaves of the sample's arguments that are no tensors and no numbers; None for the others.
        partial: what stands in the output for objects of these types, of which each stage has a part.
        written: what code around units writes to, so that each stage needs it as it was.
        drew: an operator by which code around units draws random numbers; None if it draws none, or on the CPU
            always.
        touched: parameters that code around units reads, in stages too that do not need what comes of it.
        collected: inner modules with hooks.
        around: the modules whose code is around units.
        unused: holds the parameters and buffers that no call uses; they belong to the first stage.
        floats: the numbers of those that are tensors of floating point.
        exclusive: several stages must not run at the same time, because the model's code keeps values of one
            forward in attributes, or hooks collect them.
    """

    model: nn.Module
    units: Mapping[nn.Module, str]
    calls: list[CallOfUnit]
    output: CallOfUnit
    structure: pytree.TreeSpec
    plain: list[Any]
    floats: frozenset[int]
    exclusive: bool
    partial: dict[type, Missing]
    written: frozenset[Source]
    drew: str | None
    touched: list[Held]
    turns: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._names = {module: name for name, module in self.model.named_modules()}
        self._holders: dict[nn.Module, nn.Module] = {}
        self.collected = {
            effect.module
            for call in self.calls
            for effect in call.effects
            if effect.kind == "hooks" and effect.module is not None
        }
        route((*self.units, *self.collected))
        inside = {module for unit in self.units for module in unit.modules()}
        self.around = [module for module in self._names if module not in inside]
        self.unused = self._unused()
        self._look()

    def _look(self) -> None:
        self._tables = [
            (module, table, list(table.values()))
            for module in self.around
            for table in (module._modules, module._parameters)
        ]

    def dropped_at(self, cut: int) -> frozenset[int]:
        """The numbers of the arguments that nothing from ``cut`` on needs; integers may be indices anywhere."""
        return self.floats - {source.part for source in self.live_at(cut) if source.call == INPUTS}

    def live_at(self, cut: int) -> frozenset[Source]:
        """What calls from ``cut`` on, and the output, need of the inputs and of calls before it."""
        later = [call.needs for call in (*self.calls[cut:], self.output)]
        return frozenset(source for needs in later for source in needs if source.call < cut)

    def parameters_of(self, calls: Sequence[CallOfUnit]) -> list[Held]:
        """The parameters that these calls get by code around units, each once."""
        return list(dict.fromkeys(held for call in calls for held in call.parameters))

    def name_of(self, module: nn.Module) -> str:
        """The name of a module in the model."""
        return self._names[module]

    def holder(self, owner: nn.Module) -> nn.Module:
        """A module that holds the parameters of ``owner``, and nothing that is inside it."""
        if owner not in self._holders:
            prepare([owner])
            self._holders[owner] = nn.Module()
            self._holders[owner].__dict__["_parameters"] = owner._parameters
        return self._holders[owner]

    def _unused(self) -> nn.Module:
        called = {module for call in self.calls for module in call.unit.modules()}
        used: set[Tensor | None] = {p for module in called for p in module.parameters(recurse=False)}
        for call in (*self.calls, self.output):
            used |= {held.owner._parameters[held.name] for held in call.parameters}
        unused = nn.Module()
        for module, name in self._names.items():
            if module not in called:
                own = unused._modules[name or "itself"] = nn.Module()
                own._parameters = {
                    n: p for n, p in module._parameters.items() if p is not None and p not in used
                }
                own._buffers = dict(module._buffers)
        return unused

    def settle(self, here: Iterable[nn.Module], drops: bool) -> None:
        """Called when the modules of this process have their memory.

        ``drops``: parameters and buffers of other processes are freed. They are on the meta device then, so
        that they cannot be used by mistake when training has made them stale.
        """
        if drops:
            self._drop_others(here)
        self._look()

    def _drop_others(self, here: Iterable[nn.Module]) -> None:
        kept = {tensor for module in here for tensor in (*module.parameters(), *module.buffers())}
        kept |= {buffer for module in self.around for buffer in module._buffers.values() if buffer is not None}
        touched = {held.owner._parameters[held.name] for held in self.touched}
        dropped: dict[Tensor, Tensor] = {}  # what was tied stays tied
        for module in self._names:
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None and tensor not in kept and (tensor in touched or not tensor.is_meta):
                        if tensor not in dropped:
                            dropped[tensor] = without_memory(tensor, is_read=tensor in touched)
                        table[name] = dropped[tensor]
        if any(map(is_elsewhere, (*self.model.parameters(), *self.model.buffers()))):
            self.model.register_state_dict_pre_hook(refuse_a_part)
        for unit, name in self.units.items():
            if any(map(is_elsewhere, (*unit.parameters(), *unit.buffers()))):
                not_here(unit, name)

    def check(self) -> None:
        """Raises InvalidArgument if the model has changed so that its units are not called any more."""
        for owner, table, before in self._tables:
            if len(table) != len(before) or any(a is not b for a, b in zip(table.values(), before)):
                raise InvalidArgument(
                    f"{self._changed(owner, table, before)} since the model was cut into stages; make the "
                    "Pipeline when the model is complete (close() the old one), or change what is inside the "
                    "units, which the stages follow"
                )
        route((*self.units, *self.collected))

    def _changed(self, owner: nn.Module, table: Mapping[str, Any], before: list[Any]) -> str:
        name = self._names[owner] or "the model"
        now = list(table.values())
        if len(now) != len(before):
            return f"{name} has {len(now)} modules or parameters in place of {len(before)}"
        key = next(k for k, a, b in zip(table, now, before) if a is not b)
        return f"{key!r} of {name} was replaced"

    @functools.cached_property
    def takes_keywords(self) -> bool:
        """Whether the sample's arguments are keywords alone."""
        return self.structure.children()[0].num_children == 0

    def arranged(self, arguments: Any) -> Any:
        """The arguments, keywords in the order of the sample's."""
        args, kwargs = arguments
        names = self.structure.children()[1].context
        if list(kwargs) != names and set(kwargs) == set(names):
            kwargs = {name: kwargs[name] for name in names}
        return args, kwargs

    @functools.cached_property
    def _arity(self) -> tuple[int, list[str]] | None:
        """The number of positional arguments and the names of the others, if each is one leaf."""
        args, kwargs = self.structure.children()
        if not all(child.is_leaf() for child in (*args.children(), *kwargs.children())):
            return None
        return args.num_children, kwargs.context

    def leaves_of(self, arguments: Any) -> list[Any] | None:
        """The leaves of arguments that have the structure of the sample's; None if they have not."""
        args, kwargs = arguments
        if self._arity is not None:
            count, names = self._arity
            leaves = (*args, *kwargs.values())
            if len(args) == count and list(kwargs) == names and is_flat(leaves):
                return list(leaves)
        flat, structure = pytree.tree_flatten(arguments)
        return flat if structure == self.structure else None

    def arguments_of(self, leaves: Sequence[Any]) -> Any:
        """The arguments that have these leaves, and the structure of the sample's."""
        if self._arity is None:
            return pytree.tree_unflatten(leaves, self.structure)
        count, names = self._arity
        return tuple(leaves[:count]), dict(zip(names, leaves[count:]))

    def check_like_sample(self, arguments: Any) -> None:
        """Raises InvalidArgument for arguments of another kind than the sample's.

        They might be handled by code that did not run with the sample.
        """
        arguments = self.arranged(arguments)
        structure = pytree.tree_structure(arguments)
        if structure != self.structure:
            raise InvalidArgument(
                f"step was given inputs of another structure than the sample: {_names(structure)} in place of "
                f"{_names(self.structure)}; give a sample= of the same kind as the batches"
            )
        for path_and_leaf, plain in zip(pytree.tree_flatten_with_path(arguments)[0], self.plain):
            path, leaf = path_and_leaf
            if plain is not None and leaf is not plain and leaf != plain[0]:
                raise InvalidArgument(
                    f"{input_name(path)} is {leaf!r}, and was {plain[0]!r} in the sample, with which the model "
                    "may do something else; give a sample= of the same kind as the batches"
                )


class _Thread(threading.local):
    takes_parts = False


_thread = _Thread()


@contextlib.contextmanager
def parts_taken() -> Iterator[None]:
    """Inside it, ``state_dict`` of a model gives what this process has; the rest is on the meta device."""
    before, _thread.takes_parts = _thread.takes_parts, True
    try:
        yield
    finally:
        _thread.takes_parts = before


def refuse_a_part(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """A hook of a model whose state is in several processes."""
    if _thread.takes_parts:
        return
    raise PipelineError(
        f"this process has only its own part of the {type(model).__name__}; call "
        "save_pretrained(pipe, folder) or save_checkpoint(folder, pipe) of pipeline_ext in all processes, or "
        "state_dict() of the Pipeline for its part"
    )


def _names(structure: pytree.TreeSpec) -> str:
    args, kwargs = structure.children()
    return f"{args.num_children} positional and {', '.join(map(str, kwargs.context or [])) or 'no keywords'}"


def plain_leaves(leaves: Sequence[Any]) -> list[tuple[Any] | None]:
    """The leaves that a batch must have too: flags, text, None."""
    return [(v,) if v is None or isinstance(v, (bool, str)) else None for v in leaves]
