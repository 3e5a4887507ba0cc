"""Stages that reduce their gradients themselves: in FSDP2's ``fully_shard``, or in DistributedDataParallel.

Both reduce from hooks of a backward, and a stage runs one backward for each microbatch. So reduction is off
while a step runs, and happens once, when the stage's last backward has ended. Sharded parameters are gathered
when a step begins and released when it ends. In between, reactive replicas run a stage's forwards and
backwards in different orders, so their gathers would not match.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import _C
from ..base.imported import is_dtensor, is_fully_sharded
from ..errors import InvalidArgument
from .last_backward import Body, LastBackward
from .shared_parameters import SharedParameters
from .stage import Stage

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

Kind = TypeVar("Kind", bound=nn.Module)


def reduced_in(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """The parameters whose gradients the modules, or layers inside them, reduce themselves."""
    wrapped = (layer for module in modules for layer in module.modules() if _is_wrapped(layer))
    return {parameter for layer in wrapped for parameter in layer.parameters()}


class WrappedStages:
    """The wrapped modules of all stages. They reduce in descending order of the stages.

    A stage's module may be wrapped itself, or contain wrapped layers.
    """

    def __init__(self, stages: Sequence[Stage], microbatches: int) -> None:
        self._ddp = {stage.index: layers_of(DistributedDataParallel, stage) for stage in stages}
        # Any: to type checkers torch's FSDPModule is no nn.Module.
        self._sharded: dict[int, list[Any]] = {
            stage.index: [layer for layer in layers_of(nn.Module, stage) if is_fully_sharded(layer)]
            for stage in stages
        }
        self._shared_out = {p for stage in stages for p in stage.parameters() if is_dtensor(p)}
        self._microbatches = microbatches
        self._last_backward = LastBackward(self._ddp, self._reduce)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return any(self._ddp.values()) or any(self._sharded.values())

    def check(
        self, shared: SharedParameters, plan: _C.Plan, device: torch.device, partners: Sequence[int] = ()
    ) -> None:
        """Raises InvalidArgument for wrapped or tensor-parallel stages that cannot run this plan.

        ``partners``: the processes, as numbers in the world, that run a reactive plan in one order.
        """
        wrapped: list[nn.Module] = [*self._all(self._ddp), *self._all(self._sharded)]
        of_others = self._shared_out - reduced_in(wrapped)
        if not plan.overlap:
            of_others = {p for p in of_others if not set(p.device_mesh.mesh.flatten().tolist()) <= {*partners}}
        if (plan.overlap or plan.reactive) and of_others:
            raise InvalidArgument(
                "a stage has DTensor parameters (tensor parallelism), whose processes must run all tasks in "
                "one order; give overlap=False and reactive=False"
            )
        if not wrapped:
            return
        if device.type != "cpu":
            raise InvalidArgument(
                "a stage is wrapped in fully_shard or DistributedDataParallel, which runs on CPUs only; give "
                'devices=["cpu", ...]'
            )
        if not reduced_in(wrapped).isdisjoint(shared.parameters()):
            raise InvalidArgument(
                "several stages hold a parameter that fully_shard or DistributedDataParallel reduces in one of "
                "them; leave the layers that hold it unwrapped"
            )
        if plan.overlap and any(self._sharded.values()):
            raise InvalidArgument(
                "a stage is wrapped in fully_shard, which cannot run forward and backward at the same time; "
                "give overlap=False"
            )

    def watch(self, stage: int, backward: Body) -> Body:
        """Wraps ``backward`` of a stage, ``B`` or ``W``: after a step's last one the stage's modules reduce."""
        return self._last_backward.watch(stage, backward)

    @contextlib.contextmanager
    def step(self, sends: bool) -> Iterator[None]:
        """A step runs inside it. Unless it ``sends``, gradients add up without being reduced."""
        if sends:
            self._last_backward.begin(self._microbatches)
        else:
            self._last_backward.pause()
        with self.accumulating():
            yield

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Inside it, a backward only adds to ``.grad``. On an error, sharded parameters' ``.grad`` are None."""
        with contextlib.ExitStack() as held:
            for ddp in self._all(self._ddp):
                held.enter_context(ddp.no_sync())
            for sharded in self._all(self._sharded):
                _set_reduces(sharded, False)
            try:
                yield
            except BaseException:
                self._clear()
                raise

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside it, sharded parameters are gathered."""
        try:
            for module in self._all(self._sharded):
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
            yield
        finally:
            for module in self._all(self._sharded):
                module.reshard()

    def _clear(self) -> None:
        for module in self._all(self._sharded):
            if module._get_fsdp_state()._is_root:
                _reset(module)
            for parameter in module.parameters():
                parameter.grad = None

    @staticmethod
    def _all(by_stage: dict[int, list[Kind]]) -> Iterator[Kind]:
        return itertools.chain.from_iterable(by_stage[stage] for stage in sorted(by_stage))

    def _reduce(self, stage: int) -> None:
        for module in self._ddp[stage]:
            reduce_ddp(module)
        reduce_sharded(self._sharded[stage])


def reduce_ddp(module: DistributedDataParallel) -> None:
    """Makes ``module`` average its gradients now, in its own buckets and with its hooks."""
    parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    if module.find_unused_parameters:
        parameters = [p for p in parameters if p.grad is not None]
    module.reducer.prepare_for_backward(parameters)
    # The reducer waits for a backward through each parameter, so run one that adds nothing.
    torch.autograd.backward(parameters, [p.new_zeros(()).expand_as(p) for p in parameters])
    module.require_forward_param_sync = True  # the next forward takes the first replica's buffers


def reduce_sharded(modules: "Sequence[FSDPModule]") -> None:
    """Has them average and share out the gradients now."""
    for module in modules:
        _set_reduces(module, True)
    for module in modules:
        state = module._get_fsdp_state()
        if state._is_root:
            state._root_post_backward_final_callback()  # torch.distributed.pipelining calls it too


def layers_of(kind: type[Kind], stage: Stage) -> list[Kind]:
    """The layers of one type in a stage's modules, themselves included."""
    layers = dict.fromkeys(layer for module in stage.modules() for layer in module.modules())
    return [layer for layer in layers if isinstance(layer, kind)]


def _is_wrapped(layer: nn.Module) -> bool:
    return isinstance(layer, DistributedDataParallel) or is_fully_sharded(layer)


def _set_reduces(module: "FSDPModule", reduces: bool) -> None:
    """Whether the backwards to come are to reduce."""
    module.set_requires_gradient_sync(reduces, recurse=False)
    module.set_is_last_backward(reduces)
    module.set_reshard_after_backward(False, recurse=False)


def _reset(root: "FSDPModule") -> None:
    """Makes sharded modules forget a forward or backward that failed."""
    if hasattr(root, "reset_iter_state"):
        root.reset_iter_state()
        return
    # Torch 2.11 has no method for it.
    state: Any = root._get_fsdp_state()
    if state._device.type == "cuda":
        torch.cuda.synchronize(state._device)  # collectives may still run
    shared = state._state_ctx
    for inner in shared.all_states:
        inner._modules_to_run_forward.clear()
        inner._training_state = type(inner._training_state).IDLE
        group = inner._fsdp_param_group
        if group is None:
            continue
        if group._all_gather_result is not None:
            group.wait_for_unshard()
        group._post_reduce_event = group._all_reduce_state = group._partial_reduce_output = None
        group._reshard_after_forward_event = None
        group._post_forward_indices.clear()
        group._training_state = type(group._training_state).IDLE
        group._to_sharded()
    state._comm_ctx.all_gather_state = state._comm_ctx.reduce_scatter_state = None
    state._comm_ctx.post_forward_order.clear()
    shared.iter_forward_root = None
    shared.post_backward_final_callback_queued = False
