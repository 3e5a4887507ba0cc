"""How processes share a pipeline: one process holds all ranks, or each of several processes holds one."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..engines.choice import MANY_PROCESSES, ONE_PROCESS, EngineTypes, make_reduction
from ..engines.devices import DevicesLike, of_process
from ..engines.lifetime import Lifetime
from ..engines.protocol import Engine
from ..errors import InvalidArgument
from ..model.skips import DeclaredSkips
from ..plan.build import AUTO, ScheduleLike
from ..plan.first_steps import FirstSteps
from ..processes.agreement import as_in_the_first, check_agreement, skips_of_all
from ..processes.circle import Circle
from ..processes.group import MeshLike, Processes
from ..reduction import ProcessGroupMember
from ..reduction.replica_reduction import ReplicaReduction
from ..report.trace import Trace
from ..stages.initialisation import Initialise
from ..stages.random_streams import AnyOfAll
from ..stages.ties import Ties, find_ties
from .agreed_choice import OneChooses
from .gathered_trace import TraceGathering
from .nonfinite import AddUp


class OneProcess:
    """This process holds every stage: nothing has to be agreed, tied or gathered.

    Attributes:
        group: the processes that hold the stages; None for one process.
        circle: these processes outside of steps; None for one process, and where they communicate by NCCL.
        partners: the processes that hold the same stages of one replica, as numbers in the world; empty if this
            one holds them alone. They communicate inside tasks, and run them in one order.
        engines: the engine types that run the ranks.
    """

    group: dist.ProcessGroup | None = None
    circle: Circle | None = None
    partners: Sequence[int] = ()
    engines: EngineTypes = ONE_PROCESS

    def devices(self, devices: DevicesLike) -> DevicesLike:
        """A device for each rank, from ``Pipeline(devices=)``; None: choose them."""
        return devices

    def holds(self, rank: int) -> bool:
        """Whether this process runs a rank."""
        return True

    def check_agreement(
        self, settings: Callable[[], Mapping[str, Any]], modules: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Raises InvalidArgument if two processes differ in what both name; PeerError if one is missing."""

    def as_in_the_first(self, weights: list[float]) -> list[float]:
        """The first process's weights, by which all cut a model."""
        return weights

    def skips_of_all(self, declared: Sequence[DeclaredSkips]) -> Sequence[DeclaredSkips]:
        """The skips that the stages of all processes declare; ``declared``: by those of this process."""
        return declared

    def make_equal(
        self,
        stages: Sequence[Any],
        local: Iterable[nn.Module],
        loss_fn: Any,
        rank_of_stage: Sequence[int],
        initialise: Initialise,
    ) -> Ties:
        """Gives the modules of this process memory, and the same values as in others; returns their ties."""
        initialise(modules=list(local), replicas=None)
        return Ties([])

    def reduction(self, device: torch.device) -> ReplicaReduction[Any] | None:
        """Averages gradients on ``device`` over the replicas of the mesh; None without replicas."""
        return None

    def choose_together(self, first_steps: FirstSteps) -> None:
        """Makes all processes follow one choice."""

    def add_up(self, engine: Engine[Any]) -> AddUp | None:
        """Makes a tensor the sum of those of all processes; None for one process."""
        return None

    def any_of_all(self, engine: Engine[Any]) -> AnyOfAll | None:
        """Tells whether something is true in any process; None for one process."""
        return None

    def check_gpu_choice(self, schedule: ScheduleLike, weighs: bool) -> None:
        """Raises InvalidArgument for an "auto" that GPUs do not support, unless it ``weighs`` activations."""
        if schedule != AUTO and not weighs:
            raise InvalidArgument(
                'pack="auto" is refused on GPUs: on one nothing is sent, so that K = 1 is best, and between '
                "them what a message costs cannot be measured, because each has a clock of its own; give a "
                'number, or devices=["cpu", ...]'
            )

    def gather(self, trace: Trace, lifetime: Lifetime) -> Trace | None:
        """``trace`` with the tasks of all processes, on rank 0; None on the others."""
        return trace


class ManyProcesses(OneProcess):
    """Each of several processes holds the stages of one rank."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._timeout = processes.timeout
        self._gathering = TraceGathering(processes, self._timeout)
        self._agreed = 0  # weights so far
        self.group = processes.group
        self.partners = processes.partners if len(processes.partners) > 1 else ()
        self.engines = EngineTypes(*(functools.partial(made, processes=processes) for made in MANY_PROCESSES))

    @property
    def circle(self) -> Circle | None:  # type: ignore[override]
        over_cpus = "gloo" in dist.get_backend_config(self._processes.group)
        return self._processes.circle if over_cpus else None

    def devices(self, devices: DevicesLike) -> DevicesLike:
        return of_process(devices, self._processes)

    def holds(self, rank: int) -> bool:
        return rank == self._processes.rank

    def check_agreement(
        self, settings: Callable[[], Mapping[str, Any]], modules: Callable[[], Mapping[str, Any]]
    ) -> None:
        check_agreement(self._processes, settings(), self._timeout, modules())

    def as_in_the_first(self, weights: list[float]) -> list[float]:
        self._agreed += 1
        return as_in_the_first(self._processes, f"weights {self._agreed}", weights, self._timeout)

    def skips_of_all(self, declared: Sequence[DeclaredSkips]) -> Sequence[DeclaredSkips]:
        return skips_of_all(self._processes, declared, self._timeout)

    def make_equal(
        self,
        stages: Sequence[Any],
        local: Iterable[nn.Module],
        loss_fn: Any,
        rank_of_stage: Sequence[int],
        initialise: Initialise,
    ) -> Ties:
        # Find ties first: once modules have memory here and none elsewhere, they look different.
        ties = find_ties(stages, loss_fn, rank_of_stage, self._processes)
        initialise(modules=list(local), replicas=self._processes.connect_replicas())
        ties.make_equal()
        return ties

    def reduction(self, device: torch.device) -> ReplicaReduction[Any] | None:
        replicas = self._processes.replicas
        if replicas is None:
            return None
        return make_reduction(self._processes.keep(ProcessGroupMember(replicas)), device)

    def choose_together(self, first_steps: FirstSteps) -> None:
        if first_steps.chooses:
            first_steps.others = OneChooses(self._processes, self._gathering, self._timeout)

    def add_up(self, engine: Engine[Any]) -> AddUp | None:
        return functools.partial(engine.add_up, among=self._processes.messages, timeout=self._timeout)

    def any_of_all(self, engine: Engine[Any]) -> AnyOfAll | None:
        add_up = self.add_up(engine)
        assert add_up is not None

        def any_of_all(here: bool) -> bool:
            count = torch.tensor(float(here))
            add_up(count)
            return bool(count)

        return any_of_all

    def check_gpu_choice(self, schedule: ScheduleLike, weighs: bool) -> None:
        raise InvalidArgument(
            '"auto" measures processes on CPUs; give a schedule and numbers, or devices=["cpu"]'
        )

    def gather(self, trace: Trace, lifetime: Lifetime) -> Trace | None:
        lifetime.check()
        with lifetime.turn("gather_trace was called"):
            return self._gathering.gather(trace)


def sharing_of(mesh: MeshLike, timeout: float) -> OneProcess:
    """How the processes of ``Pipeline(mesh=)`` share a pipeline. Raises InvalidArgument."""
    processes = Processes.of(mesh, timeout)
    return OneProcess() if processes is None else ManyProcesses(processes)
