"""Arrays of other libraries as torch tensors, through DLPack and without a copy."""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor
from torch.utils.dlpack import DLDeviceType, from_dlpack

from ..errors import InvalidArgument


class Array(Protocol):
    """Anything with DLPack: tensors of torch, arrays of CuPy, writable arrays of numpy, and others."""

    def __dlpack__(self) -> Any: ...

    def __dlpack_device__(self) -> tuple[int, int]: ...


def as_tensor(value: Array, name: str) -> Tensor:
    """A tensor of the same memory; a tensor itself is returned unchanged.

    Raises InvalidArgument, which calls it ``name``, if ``value`` does not lend its memory.
    """
    if isinstance(value, Tensor):
        return value
    if not hasattr(value, "__dlpack__"):
        raise InvalidArgument(f"{name} is of type {type(value).__name__}; give a tensor or an array")
    try:
        on_cpu = value.__dlpack_device__()[0] == DLDeviceType.kDLCPU
        # An unversioned capsule, because read-only memory is refused one: packers may write.
        return from_dlpack(value.__dlpack__() if on_cpu else value)
    except Exception as error:
        why = str(error).partition("\n")[0]
        raise InvalidArgument(f"{name} does not lend its memory: {why}") from error


def as_tensors(values: Iterable[Array]) -> list[Tensor]:
    """A tensor of the same memory for each value: a torch tensor, or any array with ``__dlpack__``.

    Raises InvalidArgument for values that do not lend their memory, such as numbers or read-only numpy arrays.
    """
    return [as_tensor(value, f"tensor {i}") for i, value in enumerate(values)]
