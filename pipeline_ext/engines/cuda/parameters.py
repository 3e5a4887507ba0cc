"""Aliases of the parameters for each lane.

Autograd ties each parameter's accumulation to the one stream on which the parameter was first used, and makes
that stream wait for the gradients of all others. Lanes would then wait for one another, so each lane runs on
its own aliases of the parameters. A backward leaves its gradients there, and they are added to the parameters'
in the order of the plan.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...model.module_watch import ModuleWatch
from ...stages.aliases import Holder, alias, holders
from ...stages.gradients import total
from ...stages.stage import Stage
from . import torch_side

Target = Callable[[int, nn.Parameter], nn.Parameter]


_LARGE = 64 * 2**20  # bytes of a stage's parameters


class _FlatWeights(NamedTuple):
    """A recurrent layer. It also holds its weights in a list, and moves all of them when that list changes."""

    layer: nn.RNNBase
    weights: list[Any]

    def put(self, weights: Sequence[Any]) -> None:
        self.layer._flat_weights = list(weights)
        self.layer._flat_weight_refs = [None if w is None else weakref.ref(w) for w in weights]


class LaneParameters:
    """The aliases of all stages' parameters, by lane.

    Gradients are added outside of autograd, except to a parameter with hooks (``register_hook``): its gradient
    of each microbatch goes through a backward of the parameter itself, which calls them. These run on the
    caller's stream, one after another, whatever lane the gradient is from: a hook may replace a tensor that it
    keeps, and what it frees on this stream, no other one uses.
    """

    def __init__(self, stages: Sequence[Stage], target: Target, devices: Sequence[torch.device]) -> None:
        """``target(stage, parameter)`` says where to add a stage's gradients of a parameter.

        ``devices`` are by stage.
        """
        self._stages = stages
        self._target = target
        self._devices = devices
        self._callers: dict[torch.device, Any] = {}  # their current streams when the step began
        self._holders: dict[int, list[Holder]] = {}  # by stage, like the next two
        self._flat: dict[int, list[_FlatWeights]] = {}
        self._large: dict[int, bool] = {}
        self._watch = ModuleWatch(module for stage in stages for module in stage.modules())
        self._seen: list[tuple[int, bool]] | None = None
        self._aliases: dict[tuple[int, int], dict[nn.Parameter, nn.Parameter]] = {}  # by stage and lane
        self._held: dict[tuple[int, int], list[nn.Parameter]] = {}  # the same, one for each holder
        self._replaced: list[Tensor] = []  # gradients that other lanes may still read

    def begin(self) -> None:
        """Prepares for a step: makes new aliases if parameters were replaced since the last step."""
        self._callers = {device: torch_side.current_stream(device) for device in set(self._devices)}
        replaced = self._watch.changed()
        if self._seen is not None and not replaced and self._state() == self._seen:
            return
        self._holders = {stage.index: list(holders(stage.modules())) for stage in self._stages}
        self._flat = {
            stage.index: [
                _FlatWeights(layer, list(layer._flat_weights))
                for module in stage.modules()
                for layer in module.modules()
                if isinstance(layer, nn.RNNBase)
            ]
            for stage in self._stages
        }
        self._large = {
            index: sum(p.numel() * p.itemsize for p in {holder.parameter for holder in found}) > _LARGE
            for index, found in self._holders.items()
        }
        self._aliases, self._held = {}, {}
        self._seen = self._state()

    def enter(self, stage: int, lane: int) -> None:
        """Puts the lane's aliases into the stage's modules."""
        aliases = self._aliases_of(stage, lane)
        for holder, lane_alias in zip(self._holders[stage], self._held[stage, lane]):
            holder.put(lane_alias)
        for flat in self._flat[stage]:
            flat.put([aliases.get(w, w) if isinstance(w, nn.Parameter) else w for w in flat.weights])

    def leave(self, stage: int) -> None:
        """Puts the parameters back into the stage's modules."""
        for holder in self._holders[stage]:
            holder.restore()
        for flat in self._flat[stage]:
            flat.put(flat.weights)

    def before_backward(self, stage: int, lane: int) -> None:
        """Lets autograd add large gradients directly to the parameters', so that no second copy is alive."""
        if not self._large[stage]:
            return
        for parameter, lane_alias in self._aliases_of(stage, lane).items():
            grad = self._target(stage, parameter).grad
            if grad is not None and not grad.is_sparse and not parameter._backward_hooks:
                lane_alias.grad = grad

    def after_backward(self, stage: int, lane: int) -> None:
        """Adds the gradients of the lane's aliases to those of the parameters."""
        sums, grads, hooked = [], [], []
        for parameter, lane_alias in self._aliases_of(stage, lane).items():
            grad = lane_alias.grad
            if grad is None:
                continue
            lane_alias.grad = None
            if parameter._backward_hooks:
                hooked.append((parameter, grad))
                continue
            target = self._target(stage, parameter)
            before = target.grad
            if before is None:
                target.grad = grad
            elif before.is_sparse or grad.is_sparse:
                self._replaced.append(before)
                target.grad = total(before, grad)
            elif before is not grad:
                sums.append(before)
                grads.append(grad)
        if sums:
            with torch.no_grad():
                torch._foreach_add_(sums, grads)
        if hooked:
            with torch_side.in_turn_on(self._callers[self._devices[stage]]):
                for parameter, grad in hooked:
                    # A copy, because a hook may keep it: ``grad`` is the lane's memory.
                    torch.autograd.backward(parameter, grad.clone())

    def end(self) -> None:
        """Called when the caller's streams wait for all others."""
        self._replaced.clear()

    def forget(self) -> None:
        """Drops what a failed backward left behind."""
        for aliases in self._aliases.values():
            for lane_alias in aliases.values():
                lane_alias.grad = None

    def _state(self) -> list[tuple[int, bool]]:
        return [
            (holder.parameter.data_ptr(), holder.parameter.requires_grad)
            for found in self._holders.values()
            for holder in found
        ]

    def _aliases_of(self, stage: int, lane: int) -> dict[nn.Parameter, nn.Parameter]:
        aliases = self._aliases.get((stage, lane))
        if aliases is None:
            aliases = {holder.parameter: alias(holder.parameter) for holder in self._holders[stage]}
            self._aliases[stage, lane] = aliases
            self._held[stage, lane] = [aliases[holder.parameter] for holder in self._holders[stage]]
        return aliases
