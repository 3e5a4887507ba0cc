"""Skip connections: a module stashes a tensor and a later module pops it; modules between do not pass it on."""

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument, PipelineError

Names = Sequence[str] | Callable[[Any], Sequence[str]]
Class = TypeVar("Class", bound=type[nn.Module])

_ATTRIBUTE = "_declared_skips"  # of a class of modules: its declaration


def skips(*, stash: Names = (), pop: Names = ()) -> Callable[[Class], Class]:
    """Declares which tensors the forward of a module class stashes, and which it pops.

    Example::

        @pe.skips(stash=["early"])
        class Down(nn.Module):
            def forward(self, x):
                x = self.layer(x)
                pe.stash("early", x)
                return x

        @pe.skips(pop=["early"])
        class Up(nn.Module):
            def forward(self, x):
                return self.layer(torch.cat([x, pe.pop("early")], dim=1))

    Each call of forward must stash and pop everything that is declared. In a model, one module stashes each
    name and one module pops it.

    Args:
        stash, pop: names, or a function that takes a module of the class and returns its names.

    Raises:
        InvalidArgument: if these are not names, or the class is not a subclass of nn.Module.
    """
    declaration = _Declaration(
        stash if callable(stash) else _checked_names("stash", stash),
        pop if callable(pop) else _checked_names("pop", pop),
    )

    def declare(cls: Class) -> Class:
        if not _is_module_class(cls):
            raise InvalidArgument(f"skips decorates a class of nn.Module; got {cls!r}")
        forward = cls.forward

        @functools.wraps(forward)
        def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with _Call(cls.__name__, *declaration.of(self)):
                return forward(self, *args, **kwargs)

        cls.forward = checked
        setattr(cls, _ATTRIBUTE, declaration)
        return cls

    return declare


def stash(name: str, tensor: Tensor) -> None:
    """Keeps ``tensor`` for the module that pops ``name``; in the same stage, that module gets the same object.

    Call it in the forward of a module that declares the name with ``skips``. A tensor for another stage is sent
    when its stage's forward ends; do not change it in place afterwards.

    Raises:
        InvalidArgument: if ``tensor`` is not a tensor.
        PipelineError: if the name is not declared, or is stashed already.
    """
    if not isinstance(tensor, Tensor):
        raise InvalidArgument(
            f"stash({name!r}) was given a {type(tensor).__name__}; stash one tensor for each name"
        )
    _call_that_declares("stash", name).does("stash", name)
    if _recomputes():
        return  # the first run of this forward has stashed it
    if _thread.scope is not None and name in _thread.scope:
        raise PipelineError(f"{name!r} was stashed already and nothing has popped it yet; stash it once")
    _thread.stashed[name] = tensor


def pop(name: str) -> Tensor:
    """The tensor stashed as ``name``. Call it once, in the forward of a module that declares the name.

    Raises:
        PipelineError: if the name is not declared, or nothing has stashed it, or activation checkpointing
            recomputes the code that calls it.
    """
    _call_that_declares("pop", name).does("pop", name)
    if _recomputes():
        raise PipelineError(
            f"{name!r} was popped in a part that activation checkpointing recomputes, and is gone by then; "
            "pop it before that part, and pass it in as an argument"
        )
    if name not in _thread.stashed:
        raise PipelineError(
            f"{name!r} was popped but is not there: nothing has stashed it before in this forward, or it has "
            "been popped already"
        )
    return _thread.stashed.pop(name)


class Scope(dict[str, Tensor]):
    """The tensors stashed and not yet popped in one forward of a stage. In a ``with``, the thread uses it."""

    def __enter__(self) -> "Scope":
        self._outer, _thread.scope = _thread.scope, self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.scope = self._outer

    def take(self, names: Iterable[str]) -> list[Tensor]:
        """Removes and returns the named tensors. Raises PipelineError if one is missing or others are left."""
        missing = [name for name in names if name not in self]
        if missing:
            raise PipelineError(f"{_listed(missing)} was to be stashed, but no module has in this forward")
        taken = [self.pop(name) for name in names]
        if self:
            raise PipelineError(f"{_listed(self)} was to be popped, but no module has in this forward")
        return taken


class NamedSkip(NamedTuple):
    """A skip connection: its name, the stage that stashes the tensor, and the stage that pops it."""

    name: str
    source: int
    target: int  # equal to source if both modules are in one stage


class DeclaredSkips(NamedTuple):
    """The names that a module of a stage stashes and pops."""

    stage: int
    stash: list[str]
    pop: list[str]


def declared_skips(stages: Mapping[int, nn.Module]) -> list[DeclaredSkips]:
    """The declarations of all modules in the stages."""
    declarations = (
        (index, getattr(type(module), _ATTRIBUTE, None), module)
        for index, stage in stages.items()
        for module in stage.modules()
    )
    # Sorted, because a set has another order in each process.
    return [
        DeclaredSkips(index, *map(sorted, declaration.of(module)))
        for index, declaration, module in declarations
        if declaration is not None
    ]


def find_skips(declared: Iterable[DeclaredSkips]) -> list[NamedSkip]:
    """The skip connections declared. Raises InvalidArgument if stashes and pops do not match."""
    ends: Mapping[str, dict[str, int]] = {"stash": {}, "pop": {}}
    for index, *of_module in declared:
        for what, names in zip(ends, of_module):
            for name in names:
                if name in ends[what]:
                    raise InvalidArgument(
                        f"two modules {what} {name!r}, in stages {ends[what][name]} and {index}; give each "
                        "pair of modules a name of its own"
                    )
                ends[what][name] = index
    for name, target in ends["pop"].items():
        if name not in ends["stash"]:
            raise InvalidArgument(f"stage {target} pops {name!r}, which no module stashes")
    found = []
    for name, source in ends["stash"].items():
        if name not in ends["pop"]:
            raise InvalidArgument(f"stage {source} stashes {name!r}, which no module pops")
        if ends["pop"][name] < source:
            raise InvalidArgument(
                f"stage {ends['pop'][name]} pops {name!r} before stage {source} stashes it; a skip goes forward"
            )
        found.append(NamedSkip(name, source, ends["pop"][name]))
    return found


class _Declaration(NamedTuple):
    stash: Names
    pop: Names

    def of(self, module: nn.Module) -> tuple[frozenset[str], frozenset[str]]:
        """The names that the module stashes, and those that it pops."""
        of_module = (names(module) if callable(names) else names for names in self)
        stash, pop = (frozenset(_checked_names(what, n)) for what, n in zip(self._fields, of_module))
        return stash, pop


class _Call:
    """One call of the forward of a module with a declaration, and the names it has not handled yet."""

    def __init__(self, module: str, stash: frozenset[str], pop: frozenset[str]) -> None:
        self._module = module
        self.declared = {"stash": stash, "pop": pop}
        self._left = {"stash": set(stash), "pop": set(pop)}

    def __enter__(self) -> None:
        _thread.calls.append(self)

    def __exit__(self, error: object, *_: object) -> None:
        _thread.calls.pop()
        for what, names in self._left.items():
            if names and error is None:
                raise PipelineError(
                    f"{self._module} declares {what}={sorted(names)}, but its forward has not done so"
                )

    def does(self, what: str, name: str) -> None:
        if name not in self._left[what]:
            raise PipelineError(f"the forward of {self._module} called {what}({name!r}) twice; call it once")
        self._left[what].remove(name)


class _Thread(threading.local):
    """What the calling thread has stashed: in a stage's scope, or outside a pipeline in the plain model."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []  # innermost last
        self.scope: Scope | None = None
        self._plain: dict[str, Tensor] = {}  # a failed forward may leave tensors, which the next one replaces

    @property
    def stashed(self) -> dict[str, Tensor]:
        return self._plain if self.scope is None else self.scope


_thread = _Thread()


def _call_that_declares(what: str, name: str) -> _Call:
    if not _thread.calls or name not in _thread.calls[-1].declared[what]:
        raise PipelineError(
            f"{what}({name!r}) was called outside the forward of a module that declares it; decorate its class "
            f"with @pipeline_ext.skips({what}=[{name!r}])"
        )
    return _thread.calls[-1]


def _recomputes() -> bool:
    """Whether activation checkpointing runs this forward, inside a backward of this thread."""
    return torch._C._current_graph_task_id() != -1


def _is_module_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _checked_names(what: str, names: Any) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
        raise InvalidArgument(f'{what} is {names!r}; give a list of names, as in {what}=["early"]')
    return tuple(names)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
