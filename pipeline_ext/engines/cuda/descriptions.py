"""Descriptions of messages, which processes send one another from host to host."""

import contextlib

import torch.distributed as dist
from torch import Tensor

from ...errors import PeerError, StepTimeout
from ...processes.failure import Failure
from ...processes.group import Processes, seconds
from ...processes.store import asked
from ...processes.values import as_bytes, as_tensor


class Descriptions:
    """Descriptions by name, in the store of torch.distributed; each is written once and read once.

    Attributes:
        timeout: seconds to wait for one.
    """

    def __init__(self, processes: Processes, failure: Failure) -> None:
        self.timeout = 0.0
        store = processes.own_store("descriptions", processes.members)
        self._store = asked(store.clone, processes.timeout)
        self._failure = failure
        self._awaited = ""

    def tell(self, name: str, data: Tensor) -> None:
        """``data`` is uint8, and has at least one byte. Raises StepTimeout if the store does not answer."""
        asked(lambda: self._store.set(name, as_bytes(data)), self.timeout)

    def hear(self, name: str, what: str) -> Tensor:
        """Waits for the description of this name. ``what`` is for the error message.

        Raises PeerError if it does not come in time, or a process has failed; StepTimeout if the store does not
        answer.
        """
        self._awaited = name
        if self._failure.error is not None:
            raise self._failure.known_error()

        def wait() -> bytes:
            self._store.wait([name], seconds(self.timeout))
            return self._store.get(name)

        try:
            told = asked(wait, self.timeout)
        except dist.DistError as error:
            raise PeerError(f"no process has said within {self.timeout:g} seconds {what}") from error
        finally:
            self._awaited = ""
        if not told:
            raise self._failure.known_error()
        asked(lambda: self._store.delete_key(name), self.timeout)
        return as_tensor(told)

    def give_up(self) -> None:
        """Ends the wait of another thread, once ``failure`` knows the error."""
        if self._awaited:
            with contextlib.suppress(StepTimeout, PeerError):  # then the wait ends by its own limit
                asked(lambda: self._store.clone().set(self._awaited, ""), 0.0)
