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
import torch.nn.functional as F
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
        found = _calls.get(function)
        if found is None:
            found = _calls[function] = _call_of(function)
        # Where others watch too, torch would hand the call to them, and ours would be forgotten.
        if found is _DRAWS or (found is not function and torch._C._len_torch_function_stack()):
            with _Drawing(self):
                return function(*args, **kwargs) if kwargs else function(*args)
        return found(*args, **kwargs) if kwargs else found(*args)

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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in here, and to prevent it costs more than all the rest

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = _operators.get(operator)
        if draws is None:
            draws = _operators[operator] = _SEEDED in operator.tags
        if not draws:
            return operator(*args, **kwargs) if kwargs else operator(*args)
        kwargs = kwargs or {}
        if not _is_on_cpu(args, kwargs):
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


_DRAWS: Any = object()
_calls: dict[Any, Any] = {}  # what to call in place of a function: itself, a copy of it, or _DRAWS
_operators: dict[Any, bool] = {}  # whether an operator draws
_overloads: dict[Any, tuple[Any, int]] = {}
_default_generator_lock = threading.Lock()


class _Thread(threading.local):
    stream: Still | Stream | None = None


_thread = _Thread()


def _call_of(function: Any) -> Any:
    """What to call in place of ``function``, which may draw random numbers or not."""
    if function in _KNOWN:
        return _KNOWN[function]
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = getattr(function, "overloadpacket", function).__name__
        # Another library's operator may hold any.
        return _DRAWS if _is_seeded(name) or not hasattr(torch.ops.aten, name) else function
    if _is_seeded(getattr(function, "__name__", "")):
        return _DRAWS
    return _copy_of(function, ()) if isinstance(function, types.FunctionType) else function


def _copy_of(function: types.FunctionType, callers: tuple[Any, ...]) -> Any:
    """``function`` itself if it calls nothing that draws; else a copy in which the calls that do are watched.

    _DRAWS if they cannot be told apart: they are no global names of its module.
    """
    watched: dict[str, Any] = {}
    for name in function.__code__.co_names:
        called = function.__globals__.get(name)
        if _is_seeded(name):
            if not callable(called):
                return _DRAWS
            watched[name] = _KNOWN.get(called) or _watched(called)
        elif isinstance(called, types.FunctionType) and called not in callers:
            copied = _copy_of(called, (*callers, function))
            if copied is not called:
                watched[name] = _watched(called) if copied is _DRAWS else copied
    if not watched:
        return function
    copy = types.FunctionType(
        function.__code__,
        {**function.__globals__, **watched},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _watched(function: Any) -> Any:
    """``function``, with the generator of the thread's task for what it draws."""

    def watched(*args: Any, **kwargs: Any) -> Any:
        with _Drawing(_stream()):
            return function(*args, **kwargs)

    return watched


def _stream() -> Stream:
    assert isinstance(_thread.stream, Stream)  # or the call would not be watched
    return _thread.stream


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """``F.dropout``, whose operators take no generator: what they do to a tensor on the CPU, and its bits."""
    if not training or p == 0:
        return F.dropout(input, p, training, inplace)
    if type(input) is not Tensor or input.device.type != "cpu" or not 0 < p < 1:
        with _Drawing(_stream()):
            return F.dropout(input, p, training, inplace)
    noise = torch.empty_like(input).bernoulli_(1 - p, generator=_stream().draw()).div_(1 - p)
    return input.mul_(noise) if inplace else input * noise


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``F.scaled_dot_product_attention``, which draws only for dropout."""
    with contextlib.nullcontext() if dropout_p == 0 else _Drawing(_stream()):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, *args, **kwargs)


_KNOWN = {F.dropout: _dropout, F.scaled_dot_product_attention: _attention}


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
