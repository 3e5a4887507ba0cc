"""Arrays of other libraries as torch tensors, through DLPack; nothing is copied."""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.utils.dlpack import DLDeviceType, from_dlpack

from ..errors import InvalidArgument


class Array(Protocol):
    """Lends its memory: torch's tensors, CuPy's arrays, numpy's where they are writable, and others."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


def as_tensor(value: Array, name: str) -> Tensor:
    """A tensor of the same memory; a tensor is returned as it is.

    Raises InvalidArgument for what lends no memory; ``name`` is what the error calls it.
    """
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise InvalidArgument(f"{name} is of type {type(value).__name__}; give a tensor or an array")
    try:
        on_cpu = value.__dlpack_device__()[0] == DLDeviceType.kDLCPU
        # A capsule of no particular version is not given out for memory that must not be written.
        return from_dlpack(value.__dlpack__() if on_cpu else value)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise InvalidArgument(f"{name} does not lend its memory: {why}") from error


def as_tensors(values: Iterable[Array]) -> list[Tensor]:
    """A tensor of the same memory for each value: a torch tensor, or any array that has ``__dlpack__``.

    Raises InvalidArgument for what lends no memory, as a number or numpy's read-only arrays do not.
    """
    return [as_tensor(value, f"tensor {i}") for i, value in enumerate(values)]
