"""Hands the calls of units to the run of the calling thread, if it has one."""

import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from ..errors import PipelineError

Call = Callable[..., Any]


class Run(Protocol):
    """One forward of a model, by one thread."""

    def call(self, unit: nn.Module, compute: Call, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the forward gets for a call of ``unit``; ``compute`` is the call itself, with its hooks."""
        ...


class _Thread(threading.local):
    run: Run | None = None


_thread = _Thread()


class running:
    """Inside it, ``run`` gets this thread's calls of units."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def __enter__(self) -> None:
        self._before, _thread.run = _thread.run, self._run

    def __exit__(self, *_: object) -> None:
        _thread.run = self._before


def route(units: Iterable[nn.Module]) -> None:
    """Lets calls of these modules go to the run of the calling thread. Copies and pickles know nothing of it.

    torch has a place for what is called in place of a module, hooks and all; ``nn.Module.compile`` uses it too.
    """
    for unit in units:
        if not isinstance(unit._compiled_call_impl, _Router):
            unit.__dict__["_compiled_call_impl"] = _Router(unit, unit._compiled_call_impl)


def not_here(unit: nn.Module, name: str) -> None:
    """Lets calls of a routed unit outside the pipeline raise PipelineError: another process has its memory."""
    router = unit._compiled_call_impl
    assert isinstance(router, _Router)
    router.elsewhere = name


def compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    found = module._compiled_call_impl
    return (found.compiled if isinstance(found, _Router) else found) is not None


class _Router:
    """What is called in place of a unit."""

    def __init__(self, unit: nn.Module, compiled: Call | None) -> None:
        self._unit = unit
        self.compiled = compiled
        self.elsewhere: str | None = None  # its name, if another process has its memory

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = _thread.run
        compute = self._unit._call_impl if self.compiled is None else self.compiled
        if run is None and self.elsewhere is not None:
            raise PipelineError(
                f"the weights of {self.elsewhere} are in another process, so the model cannot run here; call "
                "eval of the Pipeline in all processes, or save_pretrained(pipe, folder) and load the model "
                "from there"
            )
        # A backward that recomputes a unit is no part of the forward.
        if run is None or torch._C._current_graph_task_id() != -1:
            return compute(*args, **kwargs)
        return run.call(self._unit, compute, args, kwargs)
