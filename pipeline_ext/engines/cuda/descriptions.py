"""What processes tell one another of their messages, from host to host."""

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import PeerError
from ...processes.failure import Failure
from ...processes.group import Processes, seconds


class Descriptions:
    """Bytes by name, in the store of torch.distributed; each is told once and heard once.

    Attributes:
        timeout: seconds to wait for one.
    """

    def __init__(self, processes: Processes, failure: Failure) -> None:
        self.timeout = 0.0
        self._store = dist.PrefixStore(f"{processes.name}/descriptions", processes.store.clone())
        self._failure = failure
        self._awaited = ""

    def tell(self, name: str, data: Tensor) -> None:
        """``data`` is uint8, and has at least one byte."""
        self._store.set(name, bytes(data.numpy()))

    def hear(self, name: str, what: str) -> Tensor:
        """Returns when it has been told; ``what`` it says, for people.

        Raises PeerError where that does not happen in time, or a process has failed.
        """
        self._awaited = name
        if self._failure.error is not None:
            raise self._failure.error
        try:
            self._store.wait([name], seconds(self.timeout))
            told = self._store.get(name)
        except dist.DistError as error:
            raise PeerError(f"nobody has told within {self.timeout:g} seconds {what}") from error
        finally:
            self._awaited = ""
        if not told:
            raise self._failure.error
        self._store.delete_key(name)
        return torch.frombuffer(bytearray(told), dtype=torch.uint8)

    def give_up(self) -> None:
        """Ends the wait of another thread, once it is known who has failed."""
        if self._awaited:
            self._store.clone().set(self._awaited, "")
