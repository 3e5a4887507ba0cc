"""The processes that train one model together."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..processes.agreement import check_agreement
from ..processes.gather import of_all, to_first
from ..processes.group import Processes

_TIMEOUT = 1800.0  # seconds to wait for the other processes


class Team:
    """The processes of a group, or with None this process alone.

    Attributes:
        group: the group, or None.
        size: number of processes.
        is_first: whether this process shows and writes the results of all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else group.size()
        self.is_first = group is None or group.rank() == 0

    def check_agreement(self, settings: Mapping[str, Any]) -> None:
        """Raises InvalidArgument in all processes if two of them have different settings."""
        processes = Processes.of(self.group)
        if processes is not None:
            check_agreement(processes, settings, _TIMEOUT)

    def all_of(self, values: Sequence[float]) -> Tensor:
        """The ``values`` of all processes, float64 [processes, values].

        Raises PeerError, which names a process that is gone or does not come.
        """
        mine = [float(value) for value in values]
        return torch.tensor(of_all(mine, self.group, alone=self.group is None), dtype=torch.float64)

    def gather(self, part: Any) -> list[Any] | None:
        """The ``part`` of each process, in the first; None in the others."""
        if self.group is None:
            return [part]
        return to_first(part, self.group)
