"""That the processes of a pipeline have been given the same: compared before anything runs."""

import hashlib
import json
from collections.abc import Mapping
from typing import NoReturn

from torch import nn
from torch.distributed import DistError

from ..boundary import describe
from ..errors import InvalidArgument, PeerError
from .group import Processes, seconds

Settings = Mapping[str, list[str]]


def check_agreement(processes: Processes, settings: Settings, timeout: float) -> None:
    """Raises InvalidArgument, in every process, where two of them differ in what both have named.

    ``settings`` are lines by name. Raises PeerError for processes that have not come within ``timeout``
    seconds.
    """
    store, everyone = processes.store, processes.everyone

    def key(what: str, process: int) -> str:
        return f"{processes.name}/{what}/{process}"

    store.set(key("lines", processes.number), json.dumps(settings))
    store.set(key("digests", processes.number), json.dumps({n: _digest(s) for n, s in settings.items()}))
    try:
        store.wait([key("digests", process) for process in everyone], seconds(timeout))
    except DistError as error:
        absent = [process for process in everyone if not store.check([key("digests", process)])]
        raise PeerError(
            f"no pipeline was made in process {', '.join(map(str, absent))} within {timeout:g} seconds; all "
            "processes of a mesh make their pipelines together, and in the same order"
        ) from error
    seen: dict[str, tuple[int, str]] = {}
    for process in everyone:
        for name, digest in json.loads(store.get(key("digests", process))).items():
            first, expected = seen.setdefault(name, (process, digest))
            if digest != expected:
                of_both = [json.loads(store.get(key("lines", p)))[name] for p in (first, process)]
                _refuse(name, first, process, *of_both)


def describe_module(module: nn.Module) -> list[str]:
    """What of a module another process can compare: parameters and buffers, and the code of its classes."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    classes = dict.fromkeys(type(layer) for layer in module.modules())
    return [
        *(f"{name}: {describe(tensor)}" for name, tensor in tensors),
        *(f"{found.__module__}.{found.__qualname__} with code {_code(found)}" for found in classes),
    ]


def _code(found: type[nn.Module]) -> str:
    code = getattr(found.forward, "__code__", None)
    if code is None:
        return "of its own"
    plain = [value for value in code.co_consts if isinstance(value, (int, float, str, type(None)))]
    return _digest([code.co_code.hex(), repr(plain), repr(code.co_names)])


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def _refuse(name: str, first: int, other: int, expected: list[str], found: list[str]) -> NoReturn:
    nothing = ["nothing more"]
    pairs = zip([*expected, *nothing * len(found)], [*found, *nothing * len(expected)])
    one, another = next(pair for pair in pairs if pair[0] != pair[1])
    raise InvalidArgument(
        f"the processes of the mesh were given different pipelines: {name} is {another} in process {other} and "
        f"{one} in process {first}; give all of them the same"
    )
