"""The processes that share a pipeline, one for each rank of the plan."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InvalidArgument
from .circle import Circle
from .connections import Connections
from .notices import Notices
from .store import Store, default_store, prefixed

_TIMEOUT = 300.0
_TAG = (1 << 20) + 2  # neither messages between stages nor traces have it

MeshLike = DeviceMesh | dist.ProcessGroup | None


class Closable(Protocol):
    """Something that a pipeline opens, and closes later."""

    def close(self, idle: bool) -> None:
        """``idle``: no process waits in it."""


Opened = TypeVar("Opened", bound=Closable)
Finish = Callable[[dist.Work, float, str], None]

_made: Counter[tuple[int, ...]] = Counter()  # pipelines, by the processes that share them


class Processes:
    """This process among those that share a pipeline, and its replicas.

    Attributes:
        rank, size: this process's rank in the pipeline, and the number of ranks.
        members: the pipeline's processes by rank, as numbers in the world.
        group: the process group of the members, as given.
        replicas: the group of the processes that hold the same stages in all replicas; None without replicas.
        number: this process's number in the world.
        everyone: all processes of the pipeline and of its replicas, as numbers in the world.
        partners: the processes that hold the same stages of one replica, as numbers in the world. If there are
            several, they communicate inside tasks (tensor parallelism), and need one order of tasks.
        leads: whether this process is the first of its partners, which decides the order if tasks react.
        informed: everyone and their partners, as numbers in the world: a failure of any of them ends a step.
        name: the pipeline's name, unique among those that the same processes share.
        have_gpus: whether each process is meant to have a GPU.
        timeout: seconds to wait for another process.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        everyone: list[int],
        partners: list[int] | None = None,
        informed: list[int] | None = None,
        have_gpus: bool = False,
        timeout: float = _TIMEOUT,
    ) -> None:
        self.have_gpus = have_gpus
        self.timeout = timeout
        self.group = group
        self.replicas = replicas
        self.everyone = everyone
        self.members: list[int] = dist.get_process_group_ranks(group)
        self.rank: int = dist.get_group_rank(group, dist.get_rank())
        self.size = len(self.members)
        self.number: int = dist.get_rank()
        self.partners = partners or [self.number]
        self.leads = self.partners[0] == self.number
        self.informed = informed or everyone
        key = tuple(self.informed)
        self.name = f"pipeline_ext/{'-'.join(map(str, key))}/{_made[key]}"
        _made[key] += 1
        self.store = default_store()
        self._opened: list[Closable] = []

    @classmethod
    def of(cls, mesh: MeshLike, timeout: float = _TIMEOUT) -> "Processes | None":
        """The processes that ``Pipeline(mesh=...)`` names; None for None. Raises InvalidArgument."""
        if mesh is None:
            return None
        if not dist.is_initialized():
            raise InvalidArgument(
                "mesh names processes, and there are none yet: call torch.distributed.init_process_group "
                "first, in a script that torchrun starts"
            )
        if isinstance(mesh, dist.ProcessGroup):
            have_gpus = "nccl" in dist.get_backend_config(mesh)
            everyone = sorted(dist.get_process_group_ranks(mesh))
            return cls(mesh, None, everyone, have_gpus=have_gpus, timeout=timeout)
        if not isinstance(mesh, DeviceMesh):
            raise InvalidArgument(
                f"mesh is {mesh!r}; give a DeviceMesh with a dimension named 'pp', or a process group"
            )
        names = mesh.mesh_dim_names or ()
        if "pp" not in names:
            raise InvalidArgument(
                f"mesh has the dimensions {list(names)}; name the one whose processes hold the stages 'pp', "
                'as in init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))'
            )
        if mesh.device_type not in ("cpu", "cuda"):
            raise InvalidArgument(
                f"mesh is of {mesh.device_type} devices; processes with CPUs or CUDA devices share a pipeline"
            )
        has_replicas = "dp" in names and mesh["dp"].size() > 1
        both = mesh[tuple(n for n in names if n in ("dp", "pp"))] if has_replicas else mesh["pp"]
        everyone = sorted(both.mesh.flatten().tolist())
        replicas = mesh.get_group("dp") if has_replicas else None
        others = tuple(n for n in names if n not in ("dp", "pp"))
        partners = sorted(mesh[others].mesh.flatten().tolist()) if others else None
        informed = sorted(mesh.mesh.flatten().tolist())
        have_gpus = mesh.device_type == "cuda"
        return cls(mesh.get_group("pp"), replicas, everyone, partners, informed, have_gpus, timeout)

    @functools.cached_property
    def messages(self) -> Connections:
        """The connections between the pipeline's processes, by rank, for its messages."""
        return self.connect("messages", self.members)

    @functools.cached_property
    def decisions(self) -> Connections:
        """The connections between the partners, in their order, for what one of them decides."""
        return self.connect("decisions", self.partners)

    def agree(self, count: int | None, rank: int, finish: Finish) -> int:
        """The ``count`` of rank ``rank``, in all processes; the others' ``count`` does not matter.

        ``finish(work, timeout, whom)`` waits, and raises if a process has failed.
        """
        told = torch.tensor([0 if count is None else count])
        finish(self.messages.broadcast(told, rank), self.timeout, self.describe(rank))
        return int(told)

    @functools.cached_property
    def circle(self) -> Circle:
        """The pipeline's processes, by rank, outside of steps."""
        return Circle(self.messages, self.timeout, _TAG)

    def connect(self, purpose: str, members: Sequence[int]) -> Connections:
        """Connects ``members``, numbers in the world with this process among them. All call it together.

        Raises PeerError if one does not come within ``timeout``.
        """
        return self.keep(Connections(self.own_store(purpose, members), members, seconds(self.timeout)))

    def connect_replicas(self) -> Connections | None:
        """Connects the processes that hold the same stages; None without replicas. All call it together."""
        if self.replicas is None:
            return None
        return self.connect("replicas", dist.get_process_group_ranks(self.replicas))

    def own_store(self, purpose: str, members: Sequence[int]) -> Store:
        """The part of the store that ``members``, numbers in the world, use for one purpose."""
        # Replicas have other members, and do the same at the same time.
        return prefixed(f"{self.name}/{purpose}/{'-'.join(map(str, members))}", self.store)

    def keep(self, opened: Opened) -> Opened:
        """Returns ``opened``, which ``close`` will close."""
        self._opened.append(opened)
        return opened

    def close(self, idle: bool) -> None:
        """Closes what was opened for this pipeline alone; ``idle``: no process waits in it."""
        while self._opened:
            self._opened.pop().close(idle)

    def notices(self) -> Notices:
        """The mailboxes through which all these processes learn of a failure."""
        rank = self.informed.index(self.number)
        return Notices(self.store, self.name, rank, len(self.informed), self.timeout)

    def describe(self, rank: int) -> str:
        """A rank of the pipeline in words, for people."""
        return f"rank {rank} (process {self.members[rank]})"


def seconds(timeout: float) -> timedelta:
    """``timeout`` as torch accepts it."""
    return timedelta(seconds=min(timeout, 1e7) if math.isfinite(timeout) else 1e7)
