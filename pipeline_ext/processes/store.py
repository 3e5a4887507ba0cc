"""The store of torch.distributed, through which processes exchange small values before they are connected."""

from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, TypeVar, cast

import torch.distributed as dist

from ..base.in_time import in_time
from ..errors import PeerError, StepTimeout

SILENT = (
    "the store of torch.distributed does not answer, so that nobody can say which process it is; process 0 "
    "holds it unless torchrun does"
)
_GRACE = 1.5  # seconds beside the limit of a wait in the store, after which the store itself is silent

Found = TypeVar("Found")


class Store(Protocol):
    """A ``torch.distributed.Store``. torch's own type stubs lack some of these."""

    def set(self, key: str, value: str | bytes) -> None: ...

    def get(self, key: str) -> bytes: ...

    def add(self, key: str, amount: int) -> int: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def check(self, keys: list[str]) -> bool: ...

    def delete_key(self, key: str) -> bool: ...

    def clone(self) -> "Store":
        """The same store over a connection of its own, which can be waited at without blocking others."""


def default_store() -> Store:
    """The store of the default process group."""
    return cast(Store, dist.distributed_c10d._get_default_store())  # see Store


def prefixed(prefix: str, store: Store) -> Store:
    """``store``, in which every key begins with ``prefix``."""
    return cast(Store, dist.PrefixStore(prefix, store))  # type: ignore[attr-defined,arg-type]  # see Store


def asked(call: Callable[[], Found], timeout: float) -> Found:
    """What ``call``, which waits in the store for up to ``timeout`` seconds, returns or raises.

    A store whose host is stopped, or cut off, answers nobody, and a wait in it then ignores its own limit.
    Raises StepTimeout for such a store, PeerError for one that is gone.
    """
    try:
        return in_time(call, timeout + _GRACE)
    except TimeoutError as error:
        raise StepTimeout(SILENT) from error
    except dist.DistNetworkError as error:
        raise PeerError(f"the store of torch.distributed has gone: {error}") from error
