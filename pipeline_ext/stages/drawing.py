"""Gives the calls of one task that draw random numbers a generator of the task's own.

Calls of torch's functions are watched. Those that may draw run under a watch on operators, which hands the
generator to each operator that torch marks as drawing.
"""

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.imported import is_dtensor

_SEEDED = torch.Tag.nondeterministic_seeded


class Still:
    """The state of the caller's generator, for the ranks' threads in tasks of stages that draw nothing.

    So they keep and restore states without the generator itself: its lock, and Python's, which torch takes in
    both orders, would be contended by these threads.
    """

    def __init__(self, state: Tensor) -> None:
        self._state = state

    def hold(self) -> None:
        """From now on it is the state that this thread sees."""
        if _thread.stream is not self:
            _thread.stream = self

    def get_state(self) -> Tensor:
        return self._state.clone()

    def set_state(self, state: Tensor) -> None:
        pass


class Stream(TorchFunctionMode):
    """The random numbers of one task. Calls that draw get its generator."""

    def __init__(self, seed: int, drew: Callable[[], None]) -> None:
        super().__init__()
        self._seed = seed
        self._drew = drew
        self._generator: torch.Generator | None = None

    def __enter__(self) -> Any:
        _thread.stream = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _thread.stream = None
        super().__exit__(*error)

    def get_state(self) -> Tensor:
        return self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        self.generator.set_state(state)

    def become(self, seed: int) -> None:
        """Goes on as the stream of another task."""
        self._seed, self._generator = seed, None

    @property
    def generator(self) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator("cpu").manual_seed(self._seed)
        return self._generator

    def draw(self) -> torch.Generator:
        self._drew()
        return self.generator

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.autograd.backward:
            # Layers that it recomputes draw too.
            with self._again():
                return _backward(*args, **(kwargs or {}))
        draws = _draws.get(function)
        if draws is None:
            draws = _draws[function] = _may_draw(function)
        if draws:
            with _Drawing(self):
                return function(*args, **kwargs) if kwargs else function(*args)
        return function(*args, **kwargs) if kwargs else function(*args)

    @contextlib.contextmanager
    def _again(self) -> Iterator[None]:
        """Watches calls inside a call, which torch makes without it."""
        super().__enter__()
        try:
            yield
        finally:
            super().__exit__(None, None, None)


def _backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = (),
) -> None:
    """``torch.autograd.backward``, which hands itself over to whoever watches calls of torch."""
    del grad_variables  # torch warns of it and takes grad_tensors
    tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
    grads = (grad_tensors,) if grad_tensors is None or isinstance(grad_tensors, Tensor) else tuple(grad_tensors)
    torch.autograd.graph._engine_run_backward(
        tensors,
        tuple(torch.ones_like(t) if g is None else g for t, g in zip(tensors, grads * len(tensors))),
        create_graph if retain_graph is None else retain_graph,
        create_graph,
        (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ()),
        allow_unreachable=True,
        accumulate_grad=True,
    )


class _Drawing(TorchDispatchMode):
    """Gives the operators of one call the stream's generator."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _SEEDED not in operator.tags or not _is_on_cpu(args, kwargs):
            return operator(*args, **kwargs)
        with_generator, position = _with_generator(operator)
        if with_generator is None:
            if _probability(operator, args, kwargs) == 0:
                return operator(*args, **kwargs)
            return self._on_default_generator(operator, args, kwargs)
        given = args[position] if position < len(args) else kwargs.get("generator")
        if given is not None:
            return operator(*args, **kwargs)
        return with_generator(*args[:position], **{**kwargs, "generator": self._stream.draw()})

    def _on_default_generator(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator that takes no generator, while the process's own has the stream's state."""
        generator, default = self._stream.draw(), torch.default_generator
        with _default_generator_lock:
            before = default.get_state()
            default.set_state(generator.get_state())
            try:
                return operator(*args, **kwargs)
            finally:
                generator.set_state(default.get_state())
                default.set_state(before)


_draws: dict[Any, bool] = {}
_overloads: dict[Any, tuple[Any, int]] = {}
_default_generator_lock = threading.Lock()


class _Thread(threading.local):
    stream: Still | Stream | None = None


_thread = _Thread()


def _may_draw(function: Any) -> bool:
    """Whether a call may draw random numbers: an operator that does, or a function whose code names one."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = getattr(function, "overloadpacket", function).__name__
        return _is_seeded(name) or not hasattr(torch.ops.aten, name)  # another library's may hold any
    if _is_seeded(getattr(function, "__name__", "")):
        return True
    return isinstance(function, types.FunctionType) and _names_one(function, set())


def _names_one(function: types.FunctionType, seen: set[Any]) -> bool:
    seen.add(function)
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if _is_seeded(name):
            return True
        if isinstance(called, types.FunctionType) and called not in seen and _names_one(called, seen):
            return True
    return False


@functools.cache
def _is_seeded(name: str) -> bool:
    """Whether an operator of this name draws random numbers."""
    packet = None if not name or name.startswith("__") else getattr(torch.ops.aten, name, None)
    overloads = packet.overloads() if isinstance(packet, torch._ops.OpOverloadPacket) else ()
    return any(_SEEDED in getattr(packet, overload).tags for overload in overloads)


def _with_generator(operator: Any) -> tuple[Any, int]:
    """The overload of an operator that takes a generator, or None, and the generator's position."""
    if operator not in _overloads:
        own = operator._overloadname
        other = "generator" if own == "default" else f"{own}_generator"
        overloads = (operator, getattr(operator.overloadpacket, other, None))
        _overloads[operator] = next((o for o in map(_generator_of, overloads) if o is not None), (None, 0))
    return _overloads[operator]


def _generator_of(overload: Any) -> tuple[Any, int] | None:
    arguments = [] if overload is None else overload._schema.arguments
    for position, argument in enumerate(arguments):
        if argument.name == "generator":
            return overload, len(arguments) if argument.kwarg_only else position
    return None


def _probability(operator: Any, args: Any, kwargs: Any) -> Any:
    """An attention operator's probability of dropout; None for other operators."""
    for position, argument in enumerate(operator._schema.arguments):
        if argument.name == "dropout_p":
            return args[position] if position < len(args) else kwargs.get("dropout_p", argument.default_value)
    return None


def _is_on_cpu(args: Any, kwargs: Any) -> bool:
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    if any(is_dtensor(t) for t in tensors):
        return False
    device = kwargs.get("device")
    return all(t.device.type == "cpu" for t in tensors) and (
        device is None or torch.device(device).type == "cpu"
    )


def keep_states_by_thread() -> None:
    """Lets activation checkpointing keep and restore the state of a task's stream.

    It calls torch.get_rng_state and torch.set_rng_state. In other threads they are torch's own.
    """
    if getattr(torch.get_rng_state, "_of_streams", False):
        return
    of_process, set_of_process = torch.get_rng_state, torch.set_rng_state

    def get_rng_state() -> Tensor:
        stream = _thread.stream
        return of_process() if stream is None else stream.get_state()

    def set_rng_state(new_state: Tensor) -> None:
        stream = _thread.stream
        if stream is None:
            set_of_process(new_state)
        else:
            stream.set_state(new_state)

    get_rng_state.__doc__, set_rng_state.__doc__ = of_process.__doc__, set_of_process.__doc__
    get_rng_state._of_streams = True  # type: ignore[attr-defined]
    torch.get_rng_state, torch.set_rng_state = get_rng_state, set_rng_state
