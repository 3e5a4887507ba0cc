"""What one process of a pipeline chooses for all, and for its replicas."""

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ..errors import PeerError
from ..report.trace import Trace
from .gathered_trace import TraceGathering
from .group import Processes, seconds


class OneChooses:
    """``Others`` of a pipeline's first steps: rank 0 of the first replica chooses."""

    def __init__(self, processes: Processes, gathering: TraceGathering, timeout: float) -> None:
        """``timeout``: seconds to wait for another process."""
        self._processes = processes
        self._gathering = gathering
        self._timeout = seconds(timeout)
        replicas = processes.replicas
        self._is_first_replica = replicas is None or dist.get_rank(replicas) == 0
        self.chooses = self._is_first_replica and processes.rank == 0

    def gather(self, trace: Trace) -> Trace | None:
        """Raises PeerError for a process that is gone, or does not come in time."""
        return self._gathering.gather(trace) if self._is_first_replica else None

    def hear(self, choose: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Raises PeerError for a process that is gone, does not come in time, or could not choose."""
        said, failure = None, None
        if self.chooses:
            try:
                said = {"choice": choose()}
            except BaseException as error:
                said, failure = {"error": f"{type(error).__name__}: {error}"}, error
        processes = self._processes
        if processes.replicas is not None and processes.rank == 0:
            said = self._broadcast(said, processes.replicas, dist.get_global_rank(processes.replicas, 0))
        said = self._broadcast(said, processes.messages, processes.members[0])
        if failure is not None:
            raise failure
        if "error" in said:
            raise PeerError(f"{processes.describe(0)} was to choose a plan, and raised {said['error']}")
        return said["choice"]

    def _broadcast(self, said: Any, group: dist.ProcessGroup, first: int) -> Any:
        """What the process with number ``first`` has said; None in the others."""
        encoded = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
        size = torch.tensor([len(encoded)])
        try:
            dist.broadcast(size, first, group, async_op=True).wait(self._timeout)
            if dist.get_rank() != first:
                encoded = torch.empty(size.item(), dtype=torch.uint8)
            dist.broadcast(encoded, first, group, async_op=True).wait(self._timeout)
        except RuntimeError as error:
            raise PeerError(f"process {first} has not said which plan to follow: {error}") from error
        return json.loads(encoded.numpy().tobytes())
