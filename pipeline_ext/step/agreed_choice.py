"""One process chooses a plan for all processes of a pipeline and of its replicas."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import PeerError
from ..plan.first_steps import Profiled
from ..processes.connections import Connections
from ..processes.group import Processes, seconds
from ..processes.values import as_bytes, as_tensor, decode, encode
from ..report.trace import Trace
from .gathered_trace import TraceGathering


class OneChooses:
    """Implements ``Others`` for a pipeline's first steps: rank 0 of the first replica chooses.

    If several processes hold its stages, the first of these does.
    """

    def __init__(self, processes: Processes, gathering: TraceGathering, timeout: float) -> None:
        """``timeout``: seconds to wait for another process."""
        self._processes = processes
        self._gathering = gathering
        self._timeout = seconds(timeout)
        replicas = processes.replicas
        self._is_first_replica = replicas is None or dist.get_rank(replicas) == 0
        self.chooses = self._is_first_replica and processes.rank == 0 and processes.leads
        # A choice is broadcast over these in turn, from rank 0 of each.
        self._broadcasts: list[Connections] = [processes.messages]
        if replicas is not None and processes.rank == 0:
            members = dist.get_process_group_ranks(replicas)
            self._broadcasts.insert(0, processes.connect("choices", members))
        if len(processes.partners) > 1 and self._is_first_replica and processes.rank == 0:
            self._broadcasts.insert(0, processes.connect("choices", processes.partners))

    def gather(self, trace: Profiled) -> Trace | None:
        """Raises PeerError if a process is gone, or does not come in time."""
        assert isinstance(trace, Trace)
        return self._gathering.gather(trace) if self._is_first_replica else None

    def hear(self, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Raises PeerError if a process is gone, does not come in time, or could not choose."""
        said: Any = None
        failure: BaseException | None = None
        if self.chooses:
            try:
                said = {"choice": choose()}
            except BaseException as error:
                said, failure = {"error": f"{type(error).__name__}: {error}"}, error
        for connections in self._broadcasts:
            said = self._broadcast(said, connections)
        if failure is not None:
            raise failure
        if "error" in said:
            raise PeerError(f"{self._processes.describe(0)} could not choose a plan: {said['error']}")
        return said["choice"]

    def tell(self, value: bool) -> bool:
        """Raises PeerError if a process is gone, or does not come in time."""
        told = torch.tensor([value])
        for connections in self._broadcasts:
            self._from_the_first(told, connections)
        return bool(told)

    def _broadcast(self, said: Any, connections: Connections) -> Any:
        """What rank 0 of ``connections`` said, in each of its processes."""
        encoded = as_tensor(encode(said))
        size = torch.tensor([len(encoded)])
        self._from_the_first(size, connections)
        if connections.rank > 0:
            encoded = torch.empty(int(size), dtype=torch.uint8)
        self._from_the_first(encoded, connections)
        return decode(as_bytes(encoded))

    def _from_the_first(self, tensor: torch.Tensor, connections: Connections) -> None:
        """Gives ``tensor`` the values that it has in rank 0 of ``connections``."""
        try:
            connections.broadcast(tensor, 0).wait(self._timeout)
        except RuntimeError as error:
            chooser = connections.members[0]
            raise PeerError(f"process {chooser} has not said which plan to follow: {error}") from error
