"""Checks, before anything runs, that the processes of a pipeline were given the same arguments."""

import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from torch import nn
from torch.distributed import DistStoreError

from ..base.tensors import describe
from ..errors import InvalidArgument, PeerError
from ..model.skips import DeclaredSkips
from .differences import digest, first_difference
from .group import Processes, seconds
from .store import asked


def check_agreement(
    processes: Processes, settings: Mapping[str, Any], timeout: float, modules: Mapping[str, Any] | None = None
) -> None:
    """Raises InvalidArgument, in every process, if two of them differ in what both name.

    ``settings``, by name: lines of text, or values that are compared as text. ``modules``, by name: their
    parameters, buffers and code are compared; values that are not modules are skipped. Raises PeerError if a
    process does not come within ``timeout`` seconds or the store has gone, StepTimeout if the store is silent.
    """
    settings = {name: value if isinstance(value, list) else [f"{value}"] for name, value in settings.items()}
    for name, module in (modules or {}).items():
        if isinstance(module, nn.Module):
            settings[name] = _describe_module(module)
    _tell(processes, "lines", settings, timeout)
    _tell(processes, "digests", {name: digest(lines) for name, lines in settings.items()}, timeout)
    digests = _hear(processes, "digests", processes.everyone, timeout)
    seen: dict[str, tuple[int, str]] = {}
    for process, of_process in digests.items():
        for name, found in of_process.items():
            first, expected = seen.setdefault(name, (process, found))
            if found != expected:
                lines = _hear(processes, "lines", (first, process), timeout)
                _refuse(name, first, process, lines[first][name], lines[process][name])


def skips_of_all(processes: Processes, here: Iterable[DeclaredSkips], timeout: float) -> list[DeclaredSkips]:
    """The skips that the stages of all processes declare, by stage; ``here``: by those of this process.

    Raises as ``check_agreement`` does.
    """
    _tell(processes, "skips", list(here), timeout)
    declared = _hear(processes, "skips", processes.members, timeout)
    return sorted(
        (DeclaredSkips(*module) for of_process in declared.values() for module in of_process),
        key=lambda module: module.stage,
    )


def as_in_the_first(processes: Processes, what: str, weights: list[float], timeout: float) -> list[float]:
    """The weights of the first process of the mesh. Raises as ``check_agreement`` does.

    ``what``: a name that is used once.
    """
    first = processes.everyone[0]
    if processes.number == first:
        _tell(processes, what, weights, timeout)
    return _hear(processes, what, [first], timeout)[first]


def _tell(processes: Processes, what: str, value: Any, timeout: float) -> None:
    """Publishes a value, which JSON can hold, for the other processes."""
    key = f"{processes.name}/{what}/{processes.number}"
    asked(lambda: processes.store.set(key, json.dumps(value)), timeout)


def _hear(processes: Processes, what: str, whom: Sequence[int], timeout: float) -> dict[int, Any]:
    """What these processes published, by number in the world."""
    store = processes.store
    keys = {process: f"{processes.name}/{what}/{process}" for process in whom}

    def wait() -> dict[int, Any]:
        store.wait(list(keys.values()), seconds(timeout))
        return {process: json.loads(store.get(key)) for process, key in keys.items()}

    def seek() -> list[int]:
        return [process for process, key in keys.items() if not store.check([key])]

    try:
        return asked(wait, timeout)
    except DistStoreError as error:
        absent = asked(seek, 0.0)
        raise PeerError(
            f"no pipeline was made in process {', '.join(map(str, absent))} within {timeout:g} seconds; all "
            "processes of a mesh make their pipelines together, and in the same order"
        ) from error


def _describe_module(module: nn.Module) -> list[str]:
    """What another process can compare of a module: parameters and buffers, and the code of its classes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    classes = dict.fromkeys(type(layer) for layer in module.modules())
    return [
        *(f"{name}: {describe(tensor)}" for name, tensor in tensors),
        *(f"{found.__module__}.{found.__qualname__} with code {_code(found)}" for found in classes),
    ]


def _code(found: type[nn.Module]) -> str:
    code = getattr(inspect.unwrap(found.forward), "__code__", None)
    if code is None:
        return "of its own"
    plain = [value for value in code.co_consts if isinstance(value, (int, float, str, type(None)))]
    return digest([code.co_code.hex(), repr(plain), repr(code.co_names)])[:12]


def _refuse(name: str, first: int, other: int, expected: list[str], found: list[str]) -> NoReturn:
    one, another = first_difference(expected, found)
    raise InvalidArgument(
        f"the processes of the mesh were given different pipelines: {name} is {another} in process {other} and "
        f"{one} in process {first}; give all of them the same"
    )
