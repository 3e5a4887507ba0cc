"""A stream of random numbers for each stage and microbatch.

The CPU has one generator for the process, from which ranks would draw in the order in which they happen to run.
Here each task draws from a generator of its own, seeded from the caller's. So losses and gradients depend on
the seed and the number of microbatches alone. Calls of torch are watched in stages that draw; other stages pay
nothing.
"""

import contextlib
import functools
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.imported import is_dtensor

AnyOfAll = Callable[[bool], bool]  # whether it is true in any process

_SEEDED = torch.Tag.nondeterministic_seeded
_MASK = 2**64 - 1
_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class StepStreams:
    """The streams of one step.

    Attributes:
        base: the number from which they are seeded; it may come from another process with the first microbatch.
        drew: the stages that have drawn.
    """

    def __init__(
        self, base: int | None, watched: Callable[[int], bool], replica: int, state: Tensor | None = None
    ) -> None:
        """``watched(stage)``: whether a stage may draw. ``base`` None: no stage may.

        ``state``: of the caller's generator.
        """
        self.base = base
        self.drew: set[int] = set()
        self._watched = watched
        self._replica = replica
        self._still = _NOTHING if state is None else _Still(state)

    def of(self, stage: int, m: int, backward: bool = False) -> contextlib.AbstractContextManager[Any]:
        """The context in which a task of ``stage`` runs for microbatch ``m``."""
        if self.base is None or not self._watched(stage):
            return self._still
        return _Stream(self.seed(stage, m, backward), lambda: self.drew.add(stage))

    def of_all(self, m: int, backward: bool = False) -> contextlib.AbstractContextManager[Any]:
        """As ``of`` the first stage, whether it may draw or not. Others follow by ``_Stream.become``."""
        if self.base is None:
            return _NOTHING
        return _Stream(self.seed(0, m, backward), lambda: self.drew.add(0))

    def seed(self, stage: int, m: int, backward: bool = False) -> int:
        """What the stream of a task is seeded with."""
        assert self.base is not None
        return _seed(self.base, self._replica, stage, 2 * m + backward)


NO_STREAMS = StepStreams(None, lambda stage: False, 0)


class RandomStreams:
    """Seeds the streams of a pipeline's steps, and learns in the first one which stages draw."""

    def __init__(self, any_of_all: AnyOfAll | None = None, replica: int = 0) -> None:
        """``any_of_all``: None if this process has all stages.

        ``replica``: which of several replicas this pipeline is; each draws other numbers.
        """
        self._any_of_all = any_of_all
        self._replica = replica
        self._draws: set[int] = set()  # stages of this process
        self._anyone_draws = True  # in any process
        self._watches_all = True  # until the first training step has shown which draw
        self._learns = True
        self._state: Tensor | None = None
        _keep_states_by_thread()

    def begin(self) -> StepStreams:
        """The streams of a step."""
        self._state = torch.default_generator.get_state()
        base = _number(self._state) if self._anyone_draws else None
        return StepStreams(
            base, lambda stage: self._watches_all or stage in self._draws, self._replica, self._state
        )

    def end(self, streams: StepStreams, trains: bool) -> None:
        """Called when a step has ended. If any stage has drawn, the caller's generator moves on.

        So do those of all processes, which scripts may rely on to be alike.
        """
        assert self._state is not None  # begin was called
        moved = not torch.equal(self._state, torch.default_generator.get_state())
        self._draws |= streams.drew
        if self._learns and trains:
            drew = bool(self._draws)
            self._anyone_draws = drew if self._any_of_all is None else self._any_of_all(drew)
            self._learns = self._watches_all = False
        elif moved and not self._watches_all:
            self._warn()
        if streams.drew if self._any_of_all is None else trains and self._anyone_draws:
            torch.empty((), dtype=torch.int64, device="cpu").random_()

    def _warn(self) -> None:
        self._watches_all = True
        if self._any_of_all is None:
            self._anyone_draws = True
        warnings.warn(
            "random numbers were drawn from torch's generator during a step, by a stage that had drawn none in "
            "the first step, or by another thread of the program; in this step they depend on the timing of "
            "threads",
            stacklevel=5,
        )


class TorchsOwn(RandomStreams):
    """No streams: stages on GPUs draw from the generators of torch."""

    def __init__(self) -> None:
        pass

    def begin(self) -> StepStreams:
        return NO_STREAMS

    def end(self, streams: StepStreams, trains: bool) -> None:
        pass


class _Still:
    """The state of the caller's generator, for tasks of stages that draw nothing.

    So they keep and restore states without the generator itself: its lock, and Python's, which torch takes in
    both orders, would be contended by the ranks' threads.
    """

    def __init__(self, state: Tensor) -> None:
        self._state = state

    def __enter__(self) -> None:
        _thread.stream = self

    def __exit__(self, *_: object) -> None:
        _thread.stream = None

    def get_state(self) -> Tensor:
        return self._state.clone()

    def set_state(self, state: Tensor) -> None:
        pass


class _Stream(TorchFunctionMode):
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

    def __init__(self, stream: _Stream) -> None:
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
    stream: _Still | _Stream | None = None


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


def _number(state: Tensor) -> int:
    """A number that follows from a generator's state."""
    return int(
        torch.empty((), dtype=torch.int64, device="cpu").random_(
            generator=torch.Generator("cpu").set_state(state)
        )
    )


def _seed(*parts: int) -> int:
    """Mixes numbers (the finalizer of SplitMix64: Steele, Lea, Flood, OOPSLA 2014)."""
    mixed = 0
    for part in parts:
        mixed = (mixed + part + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return mixed


def _keep_states_by_thread() -> None:
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
