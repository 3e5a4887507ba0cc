"""The store of torch.distributed, through which processes exchange small values before they are connected."""

from datetime import timedelta
from typing import Protocol, cast

import torch.distributed as dist


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
