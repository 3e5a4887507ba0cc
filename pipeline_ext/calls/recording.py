"""Runs a model on a sample, and finds what each call of a unit needs of those before."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument
from ..microbatches.cutting import Arguments
from ..microbatches.opaque import held_tensors, how_to_open
from .kept import attributes_of, changes, entries_of, state_of
from .labels import Labels, Memory, following
from .program import INPUTS, CallOfUnit, Effect, Held, Program, Source, plain_leaves
from .routing import Call, route, running
from .values import Missing, copied, describe_leaves

_SAFE = {"transformers.utils.output_capturing"}  # whose hooks collect for each thread


def record(model: nn.Module, units: Mapping[nn.Module, str], arguments: Arguments) -> Program:
    """The program of a model in a forward with these arguments.

    Raises InvalidArgument where a stage could not know what the code around units does.
    """
    while True:
        route(units)
        recording = _Recording(model, units)
        program = recording.run(copied(arguments))
        # What computes from inputs alone, as rotary embeddings do, every stage computes for itself.
        free = {call.unit for call in program.calls if _is_free(call)}
        free -= {call.unit for call in program.calls if not _is_free(call)}
        if not free or len(free) == len(units):
            return program
        units = {unit: name for unit, name in units.items() if unit not in free}


def _is_free(call: CallOfUnit) -> bool:
    return (
        not call.parameters
        and not call.draws
        and all(source.call == INPUTS for source in call.needs)
        and next(call.unit.parameters(), None) is None
    )


class _Recording:
    """A run that computes everything. Labels say where data comes from."""

    def __init__(self, model: nn.Module, units: Mapping[nn.Module, str]) -> None:
        self._model = model
        self._units = units
        self._memory = Memory()
        self._calls: list[CallOfUnit] = []
        self._read: list[Labels] = []  # by call
        self._output = CallOfUnit(model, "the output")
        self._sources: list[Source | Held | int] = []  # by label; a number: made inside this call
        self._bits: dict[Any, Labels] = {}
        self._inside: int | None = None  # the call that runs
        self._hooks = 0  # > 0: hooks of a module inside it run
        self._of_inner: dict[nn.Module, int] = {}
        self._touched: Labels = 0  # what code around units has read
        self._of_hooks: Labels = 0  # what hooks got in this call
        self._always: Labels = 0  # what Python has looked at, and what may be an index
        self._before: list[Any] = []  # what modules around units hold
        self._changed = False  # whether that has changed since
        self._results: dict[int, list[Source]] = {}  # by memory
        self._written: set[Source] = set()
        self._drew: str | None = None
        self._partial: dict[type, Missing] = {}
        self._bracketed: set[nn.Module] = set()
        self._handles: list[Any] = []
        names = {module: name for name, module in model.named_modules()}
        self._names = names
        self._glue = [m for m in names if not _inside_units(names[m], units.values())]
        self._own: dict[nn.Module, Labels] = {}  # by unit: its parameters
        self._states: dict[int, str] = {}  # parameters and buffers, by memory
        for module, name in names.items():
            for table in (module._parameters, module._buffers):
                for own, tensor in table.items():
                    if tensor is not None and isinstance(tensor, Tensor):
                        self._states.setdefault(_address(tensor), f"{name}.{own}".lstrip("."))
        for module in names:
            for own, parameter in module._parameters.items():
                if parameter is not None and not self._memory.knows(parameter):
                    self._memory.add(parameter, self._bit(Held(module, own)))
        for unit in units:
            self._own[unit] = 0
            for parameter in unit.parameters():
                self._own[unit] |= self._memory.of(parameter)

    def run(self, arguments: Arguments) -> Program:
        leaves, structure = pytree.tree_flatten(arguments)
        for part, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self._memory.add(leaf, self._bit(Source(INPUTS, part)))
                self._results.setdefault(_address(leaf), []).append(Source(INPUTS, part))
                if not leaf.is_floating_point():
                    self._always |= self._bit(Source(INPUTS, part))
        args, kwargs = arguments
        self._before = state_of(self._glue)
        try:
            with torch.enable_grad(), running(self), following(self._memory, self):
                output = self._model(*args, **kwargs)
            self._look_for_changes()
            self._refuse_counters()
        finally:
            for handle in self._handles:
                handle.remove()
        read = self._always
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                read |= self._memory.of(leaf)
            else:
                read |= self._look_into(leaf)
        for number, (call, of_call) in enumerate(zip((*self._calls, self._output), (*self._read, read))):
            self._resolve(number, call, of_call)
        floats = [n for n, v in enumerate(leaves) if isinstance(v, Tensor) and v.is_floating_point()]
        return Program(
            model=self._model,
            units=self._units,
            calls=self._calls,
            output=self._output,
            structure=structure,
            plain=plain_leaves(leaves),
            floats=frozenset(floats),
            exclusive=self._changed or self._keeps() or self._collects(),
            partial=self._partial,
            written=frozenset(self._written),
            drew=self._drew,
            touched=[
                s for bit, s in enumerate(self._sources) if isinstance(s, Held) and self._touched >> bit & 1
            ],
        )

    def _keeps(self) -> bool:
        """Whether units leave in attributes what later code needs."""
        needed = {source for call in (*self._calls, self._output) for source in call.needs}
        return any(
            effect.kind == "attribute"
            and any(Source(n, effect.first + i) in needed for i in range(len(effect.leaves)))
            for n, call in enumerate(self._calls)
            for effect in call.effects
        )

    def _collects(self) -> bool:
        """Whether modules have hooks that may collect in memory which stages would share."""
        return any(
            getattr(hook, "__module__", "") not in _SAFE
            for unit in self._units
            for module in unit.modules()
            for hook in module._forward_hooks.values()
        )

    def _look_for_changes(self) -> None:
        self._changed = self._changed or state_of(self._glue) != self._before

    def _refuse_counters(self) -> None:
        """Code around units runs in every stage, so it must not count its runs."""
        before, now = self._before, state_of(self._glue)
        for (module, name, old), (_, _, new) in zip(before, now) if len(now) == len(before) else ():
            if type(old) in (int, float) and type(new) is type(old) and old != new and name != "training":
                where = self._names[module] or "itself"
                raise InvalidArgument(
                    f"the forward of {type(self._model).__name__} changes {name} of {where} from {old!r} to "
                    f"{new!r} in code around its units, which every stage would run; move that into a layer of "
                    "its own, or out of the forward"
                )

    def _look_into(self, value: Any) -> Labels:
        """The labels of what an object in the output holds; none if it holds what calls left in it."""
        labels = 0
        for tensor in held_tensors(value):
            labels |= self._memory.of(tensor)
        if any(isinstance(source, int) for source in self._named(labels)):
            self._partial[type(value)] = Missing(
                f"a layer of {type(self._model).__name__}", type(value).__name__, how_to_open(value)
            )
            return 0
        return labels

    def call(self, unit: nn.Module, compute: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._inside is not None or unit not in self._units:
            return compute(*args, **kwargs)  # a unit within a unit is the unit's own affair
        number = len(self._calls)
        call = CallOfUnit(unit, self._units[unit])
        self._calls.append(call)
        self._read.append(self._always)
        self._look_for_changes()
        self._bracket(unit)
        inner = list(unit.modules())
        attributes, entries = attributes_of(inner), dict(entries_of((args, kwargs)))
        given = pytree.tree_leaves((args, kwargs))
        known = {_address(leaf) for leaf in given if isinstance(leaf, Tensor)}
        self._of_inner = {}
        self._of_hooks = 0
        self._known = known
        self._inside = number
        try:
            result = compute(*args, **kwargs)
        finally:
            self._inside = None
            self._hooks = 0
        leaves, call.spec = pytree.tree_flatten(result)
        call.leaves = describe_leaves(call.name, leaves, given)
        of_hooks = self._number_hooks(call, number, shift=len(leaves))
        results = {_address(leaf) for leaf in leaves if isinstance(leaf, Tensor)}
        for part, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                collected = self._memory.of(leaf) & of_hooks
                self._label(leaf, Source(number, part), joins=_address(leaf) in known)
                self._memory.add(leaf, collected)
                self._results.setdefault(_address(leaf), []).append(Source(number, part))
                if not (leaf.is_floating_point() or leaf.is_complex()):
                    # Code around the next calls may use it as an index, where nothing else could stand in.
                    self._always |= self._bit(Source(number, part))
        for module, name, value in changes(attributes, attributes_of(inner)):
            self._add_effect(call, number, "attribute", module, name, value, results)
        for path, value in entries_of((args, kwargs)):
            if path not in entries or entries[path] is not value:
                self._add_effect(call, number, "entry", None, path, value, results)
        return result

    # -- what the watch on operators tells

    def made(self, read: Labels) -> Labels:
        if self._inside is None:
            self._touched |= read
            return read
        self._read[self._inside] |= read
        return read | self._bit(self._inside) if read and not self._hooks else read

    def looked_at(self, read: Labels) -> None:
        if self._inside is None or self._hooks:
            self._always |= read
        else:
            self._read[self._inside] |= read

    def wrote(self, tensor: Tensor) -> None:
        if self._inside is None:
            self._written.update(self._results.get(_address(tensor), ()))
        if self._inside is None and _address(tensor) in self._states:
            raise InvalidArgument(
                f"the forward of {type(self._model).__name__} writes to {self._states[_address(tensor)]} in "
                "code around its units, which every stage would run; move that into a layer of its own"
            )

    def drew(self, operator: str) -> None:
        if self._inside is None:
            self._drew = operator
        else:
            self._calls[self._inside].draws = True

    # -- labels

    def _named(self, labels: Labels) -> list[Source | Held | int]:
        return [source for bit, source in enumerate(self._sources) if labels >> bit & 1]

    def _bit(self, source: Any) -> Labels:
        if source not in self._bits:
            self._bits[source] = 1 << len(self._sources)
            self._sources.append(source)
        return self._bits[source]

    def _label(self, tensor: Tensor, source: Source, *, joins: bool) -> None:
        """``joins``: it lies in memory that the call was given, and did not only read if it is its result."""
        before = self._memory.of(tensor) & ~self._bit(source.call) if joins else 0
        self._memory.put(tensor, before | self._bit(source))

    def _add_effect(
        self,
        call: CallOfUnit,
        number: int,
        kind: str,
        module: nn.Module | None,
        place: Any,
        value: Any,
        results: set[int],
    ) -> None:
        leaves, spec = pytree.tree_flatten(value)
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            return
        first = call.parts()
        effect = Effect(kind, module, place, describe_leaves(call.name, leaves, []), spec, first)
        call.effects.append(effect)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                joins = _address(leaf) in results or _address(leaf) in self._known
                self._label(leaf, Source(number, first + i), joins=joins)

    def _bracket(self, unit: nn.Module) -> None:
        """Watches where hooks of modules inside a unit begin and end."""
        for module in unit.modules():
            if module._forward_hooks and module not in self._bracketed:
                self._bracketed.add(module)
                self._handles.append(module.register_forward_hook(self._hooks_begin, prepend=True))
                self._handles.append(module.register_forward_hook(self._hooks_end))

    def _hooks_begin(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._inside is None:
            return
        self._hooks += 1
        number, call = self._inside, self._calls[self._inside]
        leaves, spec = pytree.tree_flatten(result)
        if module is call.unit:
            for part, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor):
                    collected = self._memory.of(leaf) & self._of_hooks
                    self._label(leaf, Source(number, part), joins=_address(leaf) in self._known)
                    self._memory.add(leaf, collected)
            return
        which = self._of_inner.get(module, 0)
        self._of_inner[module] = which + 1
        first = sum(len(effect.leaves) for effect in call.effects)
        described = describe_leaves(call.name, leaves, [])
        call.effects.append(Effect("hooks", module, which, described, spec, first))
        # They get their own numbers when the leaves of the call's result are known.
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                bit = self._bit(("hooks", number, first + i))
                before = self._memory.of(leaf)
                # Modules one in another may return the same tensor, and each has hooks.
                kept = before if _address(leaf) in self._known else before & self._of_hooks
                self._memory.put(leaf, kept | bit)
                self._of_hooks |= bit

    def _number_hooks(self, call: CallOfUnit, number: int, shift: int) -> Labels:
        """Numbers what hooks were given after the leaves of the call's result; returns its labels."""
        labels = 0
        for effect in call.effects:
            for part in range(effect.first, effect.first + len(effect.leaves)):
                bit = self._bit(("hooks", number, part))
                self._sources[bit.bit_length() - 1] = Source(number, shift + part)
                self._bits[Source(number, shift + part)] = bit
                labels |= bit
            effect.first += shift
        return labels

    def _hooks_end(self, module: nn.Module, args: Any, result: Any) -> None:
        if self._inside is not None:
            self._hooks -= 1

    def _resolve(self, number: int, call: CallOfUnit, read: Labels) -> None:
        """Says what a call needs, from the labels of all that it read."""
        own = self._own.get(call.unit, 0) if call is not self._output else 0
        needs: set[Source] = set()
        for source in self._named(read):
            if isinstance(source, Source):
                if source.call != number:
                    needs.add(source)
            elif isinstance(source, Held):
                if not own & self._bit(source):
                    call.parameters.append(source)
            elif source != number:
                raise InvalidArgument(self._leak(self._calls[source], call))
        call.needs = frozenset(needs)

    def _leak(self, giver: CallOfUnit, taker: CallOfUnit) -> str:
        return (
            f"{taker.name} uses a tensor that {giver.name} computed, and that it hands on in another way than "
            "by its result, a hook, an attribute or an entry of a dict or list that it was given; a stage that "
            f"does not run {giver.name} would not have it. Return it from {giver.name}, or set use_cache=False "
            "if it is a cache"
        )


def _inside_units(name: str, units: Iterable[str]) -> bool:
    return any(name == unit or name.startswith(f"{unit}.") for unit in units)


def _address(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)
