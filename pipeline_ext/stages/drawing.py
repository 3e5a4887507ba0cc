"""Gives each operator that draws random numbers on the CPU the generator of the task that its thread runs.

Every function that draws ends in a few operators that take a generator, in torch's C++ code too: dropout in an
LSTM or in attention, layers that autograd recomputes, the calls of a tensor's class. These operators get a
kernel in front of torch's own, which fills in the generator. So nothing has to be known of the code that draws,
and code that draws nothing costs nothing.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# Torch's dispatcher asks it last before the kernels of devices, below autograd, modes and tensors' classes.
_BEFORE_DEVICES = torch._C.DispatchKey.BackendSelect
_DEVICES = torch._C._dispatch_keyset_full_after(_BEFORE_DEVICES)
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_DEFAULT: Any = torch.default_generator


class Seeds(Protocol):
    """Where the random numbers of tasks begin.

    Attributes:
        drew: the stages that have drawn.
    """

    drew: set[int]

    def seed(self, stage: int, part: int) -> int:
        """The seed of one of a stage's tasks, by its number among them."""

    def on_device(self, stage: int) -> torch.Generator | None:
        """The generator of the GPU on which a stage runs; None on the CPU."""


Task = tuple[Seeds, int, int]  # with the arguments of ``Seeds.seed``


class Calls:
    """The context of a forward whose calls of modules draw the same numbers in whatever stage they run.

    Each call draws from a stream of its own, and so does what is around calls. On the CPU what draws nothing
    pays nothing. The generator of a GPU is seeded where a call begins and ends: its operators do not all take a
    generator, but each kernel gets the state when it is enqueued.
    """

    def __init__(self) -> None:
        self._number = AROUND
        self._on_device: tuple[torch.Generator, Task] | None = None
        self._offset = 0  # of that generator's stream around calls, while a call runs
        self._streams: dict[int, Task] = {}  # by call
        self._state: Tensor | None = None  # of the stream around calls, while a call draws

    def __enter__(self) -> "Calls":
        self._outer, _thread.calls = _thread.calls, self
        task = _thread.task
        generator = None if task is None else task[0].on_device(task[1])
        if task is not None and generator is not None:
            self._on_device = generator, task
            self._seed_device()
        return self

    def __exit__(self, *_: object) -> None:
        _thread.calls = self._outer
        if self._on_device is not None:
            self._look_at_device()
            generator, (seeds, stage, part) = self._on_device
            generator.manual_seed(seeds.seed(stage, part))

    @property
    def number(self) -> int:
        """The number of the call that runs; -1 around calls."""
        return self._number

    @number.setter
    def number(self, number: int) -> None:
        if self._on_device is None:
            self._number = number
        else:
            self._look_at_device()
            self._number = number
            self._seed_device()

    def _seed_device(self) -> None:
        assert self._on_device is not None
        generator, (seeds, _, part) = self._on_device
        generator.manual_seed(seeds.seed(-2 - self._number, part))
        if self._number == AROUND:
            generator.set_offset(self._offset)

    def _look_at_device(self) -> None:
        """Notes whether what ran has drawn."""
        assert self._on_device is not None
        generator, (seeds, stage, _) = self._on_device
        offset = generator.get_offset()
        if offset != (self._offset if self._number == AROUND else 0):
            seeds.drew.add(stage)
        if self._number == AROUND:
            self._offset = offset

    def stream(self, task: Task) -> Task:
        """The stream of what runs now, as a part of ``task``."""
        if self.number not in self._streams:
            seeds, _, part = task
            self._streams[self.number] = (seeds, -2 - self.number, part)
        return self._streams[self.number]

    def leave(self, stream: Task | None, generator: torch.Generator) -> None:
        """Keeps the state of the stream around calls, if that was the generator's."""
        if stream is not None and stream is self._streams.get(AROUND):
            self._state = generator.get_state()

    def kept(self) -> Tensor | None:
        """The state in which the stream of what runs now goes on, if it has drawn before."""
        return self._state if self.number == AROUND else None


AROUND = -1


class _Thread(threading.local):
    task: Task | None = None
    calls: Calls | None = None
    _seeded: Task | None = None  # the stream for which the generator was seeded

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu")

    def generator(self, task: Task) -> torch.Generator:
        stream, kept = task, None
        if self.calls is not None:
            stream = self.calls.stream(task)
        if self._seeded is not stream:
            if self.calls is not None:
                self.calls.leave(self._seeded, self._generator)
                kept = self.calls.kept()
            if kept is None:
                seeds, stage, part = stream
                self._generator.manual_seed(seeds.seed(stage, part))
            else:
                self._generator.set_state(kept)
            self._seeded = stream
        return self._generator


_thread = _Thread()


def enter(task: Task | None) -> None:
    """From now on this thread draws the random numbers of ``task``; None: torch's own."""
    _thread.task, _thread.calls = task, None


def _kernel(operator: Any) -> Callable[..., Any]:
    """What runs in place of an operator that takes a generator."""
    position = [argument.name for argument in operator._schema.arguments].index("generator")
    run = operator._handle.redispatch_boxed

    def draw(keys: Any, *args: Any, **kwargs: Any) -> Any:
        keys = keys & _DEVICES
        task = _thread.task
        if task is not None and keys == _CPU:
            given = args[position] if position < len(args) else kwargs.get("generator")
            if given is None or given._cdata == _DEFAULT._cdata:
                seeds, stage, _ = task
                seeds.drew.add(stage)
                kwargs["generator"] = _thread.generator(task)
                args = args[:position]
        return run(keys, *args, **kwargs)

    _leave_to_python(draw)
    return draw


@functools.cache
def install() -> torch.library.Library:
    """Prepares this process. The result keeps the kernels."""
    library = torch.library.Library("aten", "IMPL")
    known = set(torch._C._dispatch_get_all_op_names())
    for schema in torch._C._jit_get_all_schemas():
        name = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        # The others are made of these.
        if (
            schema.name.startswith("aten::")
            and any(argument.name == "generator" for argument in schema.arguments)
            and name in known
            and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        ):
            packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
            operator = getattr(packet, schema.overload_name or "default")
            library.impl(name, _kernel(operator), "BackendSelect", with_keyset=True)
    _keep_states_by_task()
    return library


def _keep_states_by_task() -> None:
    """Lets activation checkpointing keep and restore the state of a task's generator.

    It calls torch.get_rng_state and torch.set_rng_state, and torch.compile those of torch.random. Outside of
    tasks they are torch's own.
    """
    of_process, set_of_process = torch.get_rng_state, torch.set_rng_state

    @functools.wraps(of_process)
    def get_rng_state() -> Tensor:
        task = _thread.task
        return of_process() if task is None else _thread.generator(task).get_state()

    @functools.wraps(set_of_process)
    def set_rng_state(new_state: Tensor) -> None:
        task = _thread.task
        if task is None:
            set_of_process(new_state)
        else:
            _thread.generator(task).set_state(new_state)

    _leave_to_python(get_rng_state)
    _leave_to_python(set_rng_state)
    torch.get_rng_state = torch.random.get_rng_state = get_rng_state
    torch.set_rng_state = torch.random.set_rng_state = set_rng_state


def _leave_to_python(function: Any) -> None:
    """Keeps torch.compile from compiling a function, and what it calls, where compiled code calls it."""
    compiler = torch._C._dynamo.eval_frame
    skip = compiler._FrameAction.SKIP
    compiler.set_code_exec_strategy(function.__code__, compiler._FrameExecStrategy(skip, skip))
