"""The arguments of a pipeline as plain data, checked once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .base import arguments
from .engines.devices import DevicesLike
from .errors import InvalidArgument
from .microbatches.counting import ROWS, LossWeight
from .microbatches.rows import Spec, check_spec
from .plan.build import ScheduleLike
from .plan.costs import Costs
from .plan.ordering import PackLike
from .processes.group import MeshLike
from .reduction import GradientReduction
from .step.nonfinite import POLICIES, SKIP

WireLike = torch.dtype | None | Mapping[int, torch.dtype | None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of ``Pipeline``, which documents them.

    Raises InvalidArgument for what can be checked without the model and the plan; ``assemble`` checks the rest.
    """

    model: nn.Module | Sequence[nn.Module]
    num_stages: int | None = None
    cuts: Sequence[str | int] | None = None
    balance: str | None = None
    sample: Any = None

    microbatches: int
    schedule: ScheduleLike = "1f1b"
    overlap: bool | None = None
    reactive: bool = True
    in_flight: int | Sequence[int] | Literal["auto"] | None = None
    costs: Costs | None = None

    devices: DevicesLike = None
    non_blocking: bool = False
    mesh: MeshLike = None
    reduction: GradientReduction | None = None
    graphs: bool = False

    args_spec: Any = None
    kwargs_spec: Any = None
    target_spec: Any = None
    batch_dim: int | None = None

    pack: PackLike = 1
    pack_forward: PackLike = 1
    pack_skips: Mapping[str, int | str] | None = None
    wire: WireLike = None
    wire_forward: WireLike = None

    loss_fn: Callable[..., Tensor] | None = None
    stage_loss: Callable[[nn.Module], Tensor] | None = None
    loss_reduction: str = "mean"
    loss_weight: LossWeight | str | None = None
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None

    nonfinite: str | None = None
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        if self.num_stages is not None:
            self._set(num_stages=arguments.count("num_stages", self.num_stages))
        self._set(microbatches=arguments.count("microbatches", self.microbatches))
        for name in ("args_spec", "kwargs_spec", "target_spec"):
            self._set(**{name: check_spec(name, getattr(self, name))})
        _check_kind("args_spec", self.args_spec, tuple, "positional arguments", "a tuple")
        _check_kind("kwargs_spec", self.kwargs_spec, dict, "keyword arguments", "a dict")
        if self.batch_dim is not None:
            arguments.check_dimension("batch_dim", self.batch_dim)
        _check_loss(self.loss_fn, self.loss_reduction)
        if self.loss_weight not in (None, ROWS):
            _check_loss_weight(self.loss_weight, self.loss_reduction, self.graphs)
        if self.stage_loss is not None and not callable(self.stage_loss):
            raise InvalidArgument(
                f"stage_loss is {self.stage_loss!r}; give a function of a stage's module that returns a scalar"
            )
        self._set(timeout=_seconds(self.timeout))
        _check_nonfinite(self.nonfinite, self.graphs, self.scaler)
        for name, accepted in (
            ("costs", Costs),
            ("reduction", GradientReduction),
            ("optimizer", torch.optim.Optimizer),
        ):
            if getattr(self, name) is not None:
                arguments.check_type(name, getattr(self, name), accepted)
        if self.scaler is not None:
            _check_scaler(self.scaler, self.optimizer, many=self.mesh is not None)

    def _set(self, **normalized: Any) -> None:
        for name, value in normalized.items():
            object.__setattr__(self, name, value)  # frozen for everyone else


def _check_kind(name: str, spec: Any, kind: type, what: str, accepted: str) -> None:
    if spec is not None and not isinstance(spec, (kind, Spec)):
        raise InvalidArgument(
            f"{name} is of the {what} of step: give {accepted} of specs, or one spec for all of them"
        )


def _check_loss(loss_fn: Any, loss_reduction: Any) -> None:
    if loss_fn is not None and not callable(loss_fn):
        raise InvalidArgument(
            f"loss_fn is {loss_fn!r}; give a function of output and target that returns a scalar"
        )
    if isinstance(loss_fn, type):
        name = loss_fn.__name__
        raise InvalidArgument(f"loss_fn is the class {name}; give an instance, {name}()")
    if loss_reduction not in ("mean", "sum"):
        raise InvalidArgument(f'loss_reduction is {loss_reduction!r}; it is "mean" or "sum"')


def _check_loss_weight(loss_weight: Any, loss_reduction: str, graphs: bool) -> None:
    if not callable(loss_weight):
        raise InvalidArgument(
            f"loss_weight is {loss_weight!r}; give a function of a microbatch's target that returns what its "
            'loss is a mean over, as pipeline_ext.count_not(-100) does, or "rows"'
        )
    if loss_reduction == "sum":
        raise InvalidArgument(
            'loss_weight weighs the means of microbatches, and loss_reduction="sum" adds sums; leave one of '
            "them out"
        )
    if graphs:
        raise InvalidArgument(
            "loss_weight and graphs=True do not go together: a graph would keep the weights of one step; for "
            'it, give loss_reduction="sum" and a loss_fn that divides by a count that is a part of the target'
        )


def _check_nonfinite(nonfinite: Any, graphs: bool, scaler: Any) -> None:
    if nonfinite is None:
        return
    if nonfinite not in POLICIES:
        raise InvalidArgument(f'nonfinite is {nonfinite!r}; it is "raise", "warn", "skip" or None')
    if graphs:
        raise InvalidArgument(
            f"nonfinite={nonfinite!r} and graphs=True do not go together: nothing looks at the values of a "
            "step that a graph replays; leave one of them out"
        )
    if nonfinite == SKIP and scaler is not None:
        raise InvalidArgument(
            'nonfinite="skip" and scaler are both given, but scaler.step leaves out such steps itself; leave '
            "nonfinite out"
        )


def _seconds(timeout: Any) -> float:
    if not (isinstance(timeout, (int, float)) and 0 < timeout < math.inf):
        raise InvalidArgument(f"timeout is {timeout!r}; give a positive number of seconds")
    return float(timeout)


def _check_scaler(scaler: Any, optimizer: torch.optim.Optimizer | None, many: bool) -> None:
    """``many``: whether several processes hold the pipeline."""
    arguments.check_type("scaler", scaler, torch.amp.GradScaler)
    if many and scaler.is_enabled():
        from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler  # it takes long to import

        if not isinstance(scaler, ShardedGradScaler):
            raise InvalidArgument(
                f"scaler is a {type(scaler).__name__}; with it one process could skip a step that others "
                "take; give torch.distributed.fsdp.sharded_grad_scaler.ShardedGradScaler(process_group=...), "
                'with the group of processes that hold the stages, as in mesh.get_group("pp")'
            )
    if optimizer is not None:
        raise InvalidArgument(
            "scaler and optimizer are both given, but the scaler must call the optimizer's step once it has "
            "the gradients; leave optimizer out, and after each step call scaler.step(optimizer)"
        )
