"""Values that all processes give and get together: as JSON, and tensors beside it. Nothing is unpickled."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..base import exact_json
from ..base.dtypes import DTYPES, NAMES
from ..errors import InvalidArgument, PipelineError
from .circle import Circle
from .connections import Connections
from .store import default_store, prefixed
from .values import decode, encode

Group = dist.ProcessGroup | None  # None: all processes

_Key = tuple[int, tuple[int, ...]]  # the store of torch.distributed, and the processes
_circles: dict[_Key, Circle] = {}
_failed: Counter[_Key] = Counter()  # circles that are not used any more


def rank_and_size(group: Group = None) -> tuple[int, int]:
    """This process's number in the group, and the number of processes; 0 and 1 without torch.distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def of_all(value: Any, group: Group = None, alone: bool = False) -> list[Any]:
    """The ``value`` of each process of the group, by rank; of this one only, if it is ``alone``.

    Values are those of ``exact_json``, without tensors. Raises PeerError, in all processes that are left, with
    the name of one that is gone or does not come within the timeout of the group.
    """
    _, size = rank_and_size(group)
    if alone or size == 1:
        return [value]
    sent = encode(exact_json.encode(value, "value"))
    with _circle(group) as circle:
        return [_read(each) for each in circle.of_all(sent)]


def wait_for_all(group: Group = None) -> None:
    """Returns when all processes have called it."""
    of_all(None, group)


def from_first(value: Any, group: Group = None, alone: bool = False) -> Any:
    """The ``value`` of the first process, in all; as ``of_all``."""
    return of_all(value, group, alone)[0]


def from_one(value: Any, source: int, group: Group = None) -> Any:
    """The ``value`` of the process ``source`` of the group, in all; its tensors are on the CPU.

    Raises InvalidArgument, in all processes, if it holds what ``exact_json`` does not keep.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        return value
    packed = _Packed(value if rank == source else None)
    described = _described(packed, group)[source]
    if rank != source:
        return _received(described, source, group)
    for other in range(size):
        if other != source:
            for tensor in packed.tensors:
                send(tensor, other, group)
    return value


def to_first(value: Any, group: Group = None) -> list[Any] | None:
    """The ``value`` of each process, in the first of the group; None in the others. Tensors are on the CPU.

    Raises InvalidArgument, in all processes, if one holds what ``exact_json`` does not keep.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        return [value]
    packed = _Packed(value)
    described = _described(packed, group)
    if rank == 0:
        return [value, *(_received(described[source], source, group) for source in range(1, size))]
    for tensor in packed.tensors:
        send(tensor, 0, group)
    return None


def send(tensor: Tensor, rank: int, group: Group = None) -> None:
    """Gives a tensor to one process of the group, which calls ``receive``.

    Raises PeerError if that is gone, or does not take it within the timeout of the group.
    """
    if tensor.numel():
        with _circle(group) as circle:
            circle.send(_raw(tensor.detach().cpu().contiguous()), rank)


def receive(shape: Sequence[int], dtype: torch.dtype, rank: int, group: Group = None) -> Tensor:
    """The tensor that process ``rank`` of the group sends this one, on the CPU. Raises as ``send`` does."""
    tensor = torch.empty(tuple(shape), dtype=dtype)
    if tensor.numel():
        with _circle(group) as circle:
            circle.receive(_raw(tensor), rank)
    return tensor


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as a tensor of them: it shares the memory."""
    return tensor.reshape(-1).view(torch.uint8)


class _Packed:
    """A value as JSON, with its tensors beside it."""

    def __init__(self, value: Any) -> None:
        self.tensors: list[Tensor] = []
        self.refused: str | None = None
        self.structure = None
        try:
            self.structure = exact_json.encode(value, "value", self._put)
        except InvalidArgument as error:
            self.refused = str(error)

    def _put(self, tensor: Tensor) -> str:
        if tensor.dtype not in NAMES or tensor.layout != torch.strided:
            raise InvalidArgument(f"a tensor of type {tensor.dtype} and layout {tensor.layout} cannot be sent")
        self.tensors.append(tensor.detach().contiguous())
        return str(len(self.tensors) - 1)

    def described(self) -> dict[str, Any]:
        looks = [[NAMES[tensor.dtype], list(tensor.shape)] for tensor in self.tensors]
        return {"refused": self.refused, "structure": self.structure, "looks": looks}

    def filled(self, structure: Any) -> Any:
        """The value of a structure, with these tensors."""
        return exact_json.decode(structure, lambda number: self.tensors[int(number)])


def _received(described: Mapping[str, Any], source: int, group: Group) -> Any:
    """What another process sends, and has described."""
    packed = _Packed(None)
    packed.tensors = [receive(shape, DTYPES[dtype], source, group) for dtype, shape in described["looks"]]
    return packed.filled(described["structure"])


def _described(packed: _Packed, group: Group) -> list[dict[str, Any]]:
    found = of_all(packed.described(), group)
    for number, described in enumerate(found):
        if described["refused"] is not None:
            raise InvalidArgument(f"what process {number} sends cannot be sent: {described['refused']}")
    return found


def _read(encoded: bytes) -> Any:
    try:
        return exact_json.decode(decode(encoded))
    except ValueError as error:
        raise PipelineError(f"another process sent what this one cannot read: {error}") from error


@contextlib.contextmanager
def _circle(group: Group) -> Iterator[Circle]:
    """The processes of the group, connected at its first use, and after a failure anew."""
    ranks = tuple(dist.get_process_group_ranks(group))
    key = (id(default_store()), ranks)
    if key not in _circles:
        name = f"pipeline_ext/circle/{'-'.join(map(str, ranks))}/{_failed[key]}"
        timeout = _timeout(group)
        connections = Connections(prefixed(name, default_store()), ranks, timeout)
        _circles[key] = Circle(connections, timeout.total_seconds())
    try:
        yield _circles[key]
    except BaseException:
        _failed[key] += 1
        _circles.pop(key).close()
        raise


def _timeout(group: Group) -> timedelta:
    on = "cpu" if "gloo" in dist.get_backend_config(group) else "cuda"
    backend = (group or dist.group.WORLD)._get_backend(torch.device(on))  # type: ignore[union-attr]
    return backend.options._timeout
