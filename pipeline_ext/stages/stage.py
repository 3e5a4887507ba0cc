"""A module as a stage: forward and backward of one microbatch, the backward whole or split."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..base.tensors import describe, detach, differentiable
from ..errors import InvalidArgument
from ..microbatches.joining import detached
from ..model.skips import NamedSkip
from ..transport.dtensors import Meshes
from . import boundary
from .abandoned import this_thread
from .elsewhere import refused
from .finite import GRADIENT, LOSS, RESULT
from .loss_means import check_no_sum, means_in
from .loss_view import LossView
from .reach import NoDerivativeByReceived, Owners, reached
from .skips import StageSkips
from .split_backward import WeightGradients, find_input_gradients, run_backward
from .step import Step

Arguments = tuple[tuple, dict[str, Any]]

_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


@dataclass(frozen=True)
class WithLoss:
    """What a stage may return: a value for the next stage, and a scalar that adds to the total loss.

    For auxiliary losses, such as the load balancing of mixture-of-experts layers. The scalar is weighted like
    the microbatch's own loss.
    """

    value: Any
    loss: Tensor


class InFlight(NamedTuple):
    """What a microbatch's backward needs."""

    received: list[boundary.Received]
    popped: list[list[boundary.Received]]  # by skip that ends here
    sent: list[Tensor]  # tensors of its result that require a gradient
    stashed: list[Tensor]  # for later stages
    losses: list[tuple[Tensor, float]]  # scalars that this stage adds to the total loss, and their weights

    def leaves(self) -> list[Tensor]:
        return [tensor.leaf for part in (self.received, *self.popped) for tensor in part]


class Stage:
    """One slice of the model.

    ``forward``, ``backward``, ``input_gradient``, ``weight_gradient`` and ``evaluate`` are the bodies of the
    tasks ``F``, ``B``, ``I``, ``W``, and ``F`` of an evaluation. Only the last stage has a ``loss_fn``. If it
    is a module, its parameters are trained too. ``stage_loss`` of the module adds to the total loss. ``skips``:
    those of all stages. ``mesh``: the mesh of all processes, on which DTensors from other stages may lie.
    ``owners`` know the parameters of all stages, ``loss_view`` what ``loss_fn`` sees of them; without
    ``owners`` nothing is refused. ``elsewhere``: the stages of other processes.

    Attributes:
        is_last: whether it is the model's last stage, so that its output is the model's.
        thread: a token of the thread that runs a backward of this stage; None if none does.
        unsplit: why the last ``I`` ran the full backward; empty if it was split.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        *,
        is_last: bool,
        loss_fn: Callable[..., Tensor] | None = None,
        stage_loss: Callable[[nn.Module], Tensor] | None = None,
        skips: Sequence[NamedSkip] = (),
        mesh: DeviceMesh | None = None,
        owners: Owners | None = None,
        elsewhere: Mapping[int, nn.Module] | None = None,
        loss_view: LossView | None = None,
    ) -> None:
        self.index = index
        self.module = module
        self.thread: object | None = None
        self.unsplit = ""
        self.is_last = is_last
        self._loss_fn = loss_fn
        self._stage_loss = stage_loss
        # Where stages take turns, because their code keeps values in modules that they share.
        self._turns: contextlib.AbstractContextManager[Any] = getattr(module, "turns", _NOTHING)
        self._owners = owners
        self._elsewhere = elsewhere or {}
        self._loss_view = loss_view
        self._checked = owners is None  # whether a forward's whole graph was
        self._loss_is_torchs = _is_torchs(loss_fn)
        self._meshes = Meshes(self.modules(), mesh)
        self._step: Step | None = None
        self._entrance = boundary.Entrance()
        self._skips = StageSkips(index, skips)
        self._in_flight: dict[int, InFlight] = {}
        self._weight_grads: dict[int, WeightGradients] = {}  # between a microbatch's ``I`` and its ``W``

    def modules(self) -> list[nn.Module]:
        """The stage's module, and its loss function if that is a module."""
        return [m for m in (self.module, self._loss_fn) if isinstance(m, nn.Module)]

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the stage, and of its loss function, each once."""
        return list(dict.fromkeys(p for module in self.modules() for p in module.parameters()))

    def begin(self, step: Step) -> None:
        """Prepares for a step."""
        self._step = step
        self._entrance.begin()
        self._skips.begin()
        self._in_flight = {}
        self._weight_grads = {}

    def end(self) -> None:
        """Drops everything that belongs to the step."""
        self._step = None
        self._in_flight = {}
        self._weight_grads = {}

    def _running(self) -> Step:
        assert self._step is not None  # tasks run between begin and end
        return self._step

    def forward(self, m: int) -> None:
        """Runs microbatch ``m``, hands the result on, and keeps what its backward needs."""
        step = self._running()
        step.context.apply()
        if step.memory is None:
            self._run_forward(step, m)
        else:
            with step.memory.of_forward(self.index):
                self._run_forward(step, m)

    def _run_forward(self, step: Step, m: int) -> None:
        arguments, received = self._receive(step, m)
        scope = self._skips.receive(step.exchange, m)
        popped = self._skips.enter(scope)
        if step.memory is not None and self.index > 0:
            step.memory.given(self.index, (arguments, [tensor.leaf for part in popped for tensor in part]))
        all_received = [tensor for part in (received, *popped) for tensor in part] if popped else received
        losses: list[tuple[Tensor, float]] = []
        step.random.enter(self.index, m)
        try:
            with step.context.forward(), scope:
                value = self._run_module(arguments)
                if isinstance(value, WithLoss):
                    losses.append((_checked(value.loss, "the loss in WithLoss"), step.weight(m)))
                    value = value.value
                if self._stage_loss is not None:
                    added = _checked(self._stage_loss(self.module), "what stage_loss returned")
                    losses.append((added, step.weight(m)))
                if self.is_last:
                    loss = self._loss_of(step, m, value, arguments, all_received)
                    if step.means is not None:
                        check_no_sum(loss)
                        step.means[m] = means_in(loss)
                    losses.insert(0, (loss, step.loss_weight(m)))
                    step.losses[m] = loss.detach()
            boundary.check_aliases(all_received)
        except Exception:
            self._entrance.failed()
            self._skips.failed()
            raise
        if losses:
            step.contributions[self.index][m] = [_weighted(loss.detach(), weight) for loss, weight in losses]
        if step.memory is not None:
            step.memory.computed(self.index)
        if self.is_last:
            sent = []
            if step.keep_outputs:
                step.outputs[m] = detached(value)
        else:
            sent = differentiable(value)
            self._meshes.learn(sent)
            if not self._checked:
                self._check_whole([*(loss for loss, _ in losses), *sent], all_received)
            step.exchange.send_value(self.index, m, value)
        stashed = self._skips.send(step.exchange, m, scope)
        if step.watch is not None:
            step.watch.look(RESULT, self.index, m, [*sent, *stashed])
            step.watch.look(LOSS, self.index, m, (loss for loss, weight in losses if weight != 0))
        self._in_flight[m] = InFlight(received, popped, sent, stashed, losses)

    def backward(self, m: int) -> None:
        """Runs microbatch ``m`` backward; sends its input's gradients back, adds the others to ``.grad``."""
        self.thread = this_thread()
        step = self._running()
        step.context.apply()
        step.random.enter(self.index, m, backward=True)
        self._run_backward(step, m)
        step.exchange.release(self.index, m)
        self.thread = None

    def input_gradient(self, m: int) -> None:
        """Runs the part of microbatch ``m``'s backward that leads to its input; sends the gradients back."""
        self.thread = this_thread()
        step = self._running()
        step.context.apply()
        outputs, grads, in_flight = self._begin_backward(step, m)
        if outputs:
            step.random.enter(self.index, m, backward=True)
            with self._turns:
                found = find_input_gradients(outputs, grads, in_flight.leaves())
            self._weight_grads[m] = found
            self.unsplit = found.whole
        self._send_back(step, m, in_flight)
        self.thread = None

    def weight_gradient(self, m: int) -> None:
        """Runs the rest of microbatch ``m``'s backward: adds its parameters' gradients to ``.grad``."""
        self.thread = this_thread()
        step = self._running()
        step.context.apply()
        if m in self._weight_grads:
            step.random.enter(self.index, m, backward=True)
            with self._turns:
                self._weight_grads.pop(m).add()
        step.exchange.release(self.index, m)
        self.thread = None

    def evaluate(self, m: int) -> None:
        """Runs microbatch ``m`` without gradients and hands the result on."""
        step = self._running()
        step.context.apply()
        self._evaluate(step, m)
        step.exchange.release(self.index, m)

    def _run_backward(self, step: Step, m: int) -> None:
        outputs, grads, in_flight = self._begin_backward(step, m)
        if outputs:
            with self._turns:
                run_backward(outputs, grads)
        self._send_back(step, m, in_flight)

    def _begin_backward(self, step: Step, m: int) -> tuple[list[Tensor], list[Tensor], InFlight]:
        """Microbatch ``m``'s outputs that its backward begins at, their gradients, and what was kept for it."""
        in_flight = self._in_flight.pop(m)
        outputs: list[Tensor] = []
        grads_out: list[Tensor] = []
        for loss, weight in in_flight.losses:
            if loss.requires_grad and weight != 0:
                outputs.append(loss)
                grads_out.append(step.gradient_of(loss, weight))
        # Skips first: plain autograd computes the gradients of later uses before those of earlier ones.
        grads = [
            *self._skips.receive_gradients(step.exchange, m),
            *step.exchange.receive_gradients(self.index, m, self._meshes),
        ]
        for tensor, grad in zip((*in_flight.stashed, *in_flight.sent), grads):
            if grad is not None:
                outputs.append(tensor)
                grads_out.append(grad)
        if outputs:
            step.has_trained = True
        return outputs, grads_out, in_flight

    def _send_back(self, step: Step, m: int, in_flight: InFlight) -> None:
        self._entrance.returned(in_flight.received)
        grads_in = [tensor.gradient() for tensor in in_flight.received]
        if step.watch is not None:
            step.watch.look(GRADIENT, self.index, m, grads_in)
        if self.index == 0:
            step.input_grads[m] = grads_in
        else:
            step.exchange.send_gradients(self.index, m, grads_in)
        self._skips.send_gradients(step.exchange, m, in_flight.popped)

    def _evaluate(self, step: Step, m: int) -> None:
        scope = self._skips.receive(step.exchange, m)
        arguments = self._arguments(step, m)
        step.random.enter(self.index, m)
        with torch.no_grad(), step.context.forward(), scope:
            value = self._run_module(arguments)
        if isinstance(value, WithLoss):
            value = value.value
        if self.is_last:
            step.outputs[m] = detach(value)
        else:
            step.exchange.send_value(self.index, m, value)
        self._skips.send(step.exchange, m, scope)

    def _arguments(self, step: Step, m: int) -> Arguments:
        if self.index == 0:
            assert step.inputs is not None  # they are given to the process with the first stage
            return step.inputs[m]
        return (step.exchange.receive_value(self.index, m, self._meshes),), {}

    def _receive(self, step: Step, m: int) -> tuple[Arguments, list[boundary.Received]]:
        arguments = self._arguments(step, m)
        if self.index > 0:
            (value,), nothing = arguments
            value, received = self._entrance.receive(value)
            return ((value,), nothing), received
        if not step.input_tensors[m]:
            return arguments, []
        return self._entrance.receive(arguments, own=True)

    def _run_module(self, arguments: Arguments) -> Any:
        args, kwargs = arguments
        try:
            return self.module(*args, **kwargs)
        except Exception as error:
            if self.index > 0:
                error.add_note(
                    f"stage {self.index} was given {describe(args[0])} by stage {self.index - 1}; if "
                    "that is not what it takes, mend the layers on either side of the cut, or cut elsewhere"
                )
            else:
                error.add_note(f"stage 0 was given {describe(arguments)} by the step")
                if isinstance(error, TypeError) and self._running().targets is None and len(args) > 1:
                    error.add_note("if the last argument is the target, give it as target=")
            raise

    def _loss_of(
        self, step: Step, m: int, value: Any, arguments: Arguments, received: list[boundary.Received]
    ) -> Tensor:
        """The loss of a microbatch. Raises InvalidArgument if its gradient would lack terms, or be wrong."""
        if self._checked or self.index == 0:
            loss = self._call_loss(step, m, value)
        else:
            with NoDerivativeByReceived(differentiable(arguments)), refused(self._elsewhere):
                loss = self._call_loss(step, m, value)
        if self._owners is None or (self._checked and self._loss_is_torchs):
            return loss
        outputs = differentiable(value)
        leaves = reached([loss], outputs)
        if not leaves and self._checked:
            return loss
        view = self._loss_view
        if view is not None and self._owners.foreign(leaves, self.index) and view.show_others():
            loss = self._call_loss(step, m, value)
            leaves = reached([loss], outputs)
        self._owners.check("the loss that loss_fn returned", leaves, self.index, received)
        if not self._checked:
            self._check_whole([loss, *outputs], received)
        return loss

    def _call_loss(self, step: Step, m: int, value: Any) -> Tensor:
        assert self._loss_fn is not None  # a training step has one
        arguments = (value,) if step.targets is None else (value, step.targets[m])
        try:
            if self._loss_view is None or not self._loss_view.differs:
                loss = self._loss_fn(*arguments)
            else:
                with self._loss_view.shown():
                    loss = self._loss_fn(*arguments)
        except TypeError as error:
            if step.targets is None:
                error.add_note("step was given no target=, so loss_fn was called with the output alone")
            raise
        return _checked(loss, "what loss_fn returned")

    def _check_whole(self, results: list[Tensor], received: list[boundary.Received]) -> None:
        """Checks once that nothing in the stage's graph belongs to another stage."""
        assert self._owners is not None
        self._owners.check(f"the result of stage {self.index}", reached(results), self.index, received)
        self._checked = True


def _is_torchs(loss_fn: Any) -> bool:
    """Whether it is a loss of torch's own, which reaches for nothing but its arguments."""
    names = (getattr(loss_fn, "__module__", ""), type(loss_fn).__module__)
    return "torch.nn.functional" in names or "torch.nn.modules.loss" in names


def _weighted(loss: Tensor, weight: float) -> Tensor:
    """A loss as it enters the total; one that does not count may be nan."""
    if weight == 0:
        return torch.zeros_like(loss)
    return loss if weight == 1 else loss * weight


def _checked(loss: Any, what: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
        raise InvalidArgument(
            f"{what} must be a real tensor without dimensions, the mean or sum over the microbatch; "
            f"got {describe(loss)}"
        )
    return loss
