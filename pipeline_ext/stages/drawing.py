"""Gives each operator that draws random numbers on the CPU the generator of the task that its thread runs.

Every function that draws ends in a few operators that take a generator, in torch's C++ code too: dropout in an
LSTM or in attention, layers that autograd recomputes, the calls of a tensor's class. These operators get a
kernel in front of torch's own, which fills in the generator. So nothing has to be known of the code that draws,
and code that draws nothing costs nothing.
"""

import contextlib
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


Task = tuple[Seeds, int, int]  # with the arguments of ``Seeds.seed``


class _Thread(threading.local):
    task: Task | None = None
    _seeded: Task | None = None  # the task for which the generator was seeded

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu")

    def generator(self, task: Task) -> torch.Generator:
        if self._seeded is not task:
            seeds, stage, part = task
            self._generator.manual_seed(seeds.seed(stage, part))
            self._seeded = task
        return self._generator

    def leave(self, outer: Task) -> Tensor | None:
        """The state of the generator, if ``outer`` has drawn."""
        return self._generator.get_state() if self._seeded is outer else None

    def come_back(self, outer: Task, state: Tensor | None) -> None:
        self.task = outer
        if state is not None:
            self._generator.set_state(state)
            self._seeded = outer


class _Branch:
    """A part of a task that draws from a stream of its own."""

    def __init__(self, outer: Task, inner: Task) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._state = _thread.leave(self._outer)
        _thread.task = self._inner

    def __exit__(self, *_: object) -> None:
        _thread.come_back(self._outer, self._state)


_thread = _Thread()


def branch(call: int) -> contextlib.AbstractContextManager[Any]:
    """The context in which one call of a module runs: it draws the same numbers in whatever stage that is.

    ``call``: its number in the forward; -1 for what is around calls. Afterwards the task goes on where it was.
    """
    outer = _thread.task
    if outer is None:
        return _NOTHING
    seeds, _, part = outer
    return _Branch(outer, (seeds, -2 - call, part))


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def enter(task: Task | None) -> None:
    """From now on this thread draws the random numbers of ``task``; None: torch's own."""
    _thread.task = task


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
