"""A module as a stage: forward and backward of one microbatch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import boundary
from .errors import InvalidArgument
from .gradients import Accumulator, leaves_of_graph
from .step import Step


@dataclass(frozen=True)
class WithLoss:
    """What a stage may return: a value for the next stage, and a scalar that adds to the total loss.

    For auxiliary losses, such as the load balancing of mixture-of-experts layers. The scalar is weighted
    as the microbatch's own loss is.
    """

    value: Any
    loss: Tensor


class _InFlight(NamedTuple):
    """What a microbatch's backward needs."""

    received: list[Tensor]  # leaves at the stage's entry
    sent: list[Tensor]  # tensors at its exit that require a gradient
    contributions: list[Tensor]  # scalars of this stage in the total loss


class Stage:
    """One slice of the model. ``forward``, ``backward`` and ``evaluate`` are the bodies of tasks.

    ``loss_fn`` is given to the last stage alone. If it is a module, its parameters are trained too.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        *,
        is_last: bool,
        loss_fn: Callable[..., Tensor] | None = None,
    ) -> None:
        self.index = index
        self.module = module
        self.accumulator = Accumulator()
        self._is_last = is_last
        self._loss_fn = loss_fn
        self._step: Step | None = None
        self._in_flight: dict[int, _InFlight] = {}
        self._trained: list[Tensor] = []
        self._graph_searched = False

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the stage, and of its loss function, each once."""
        found = dict.fromkeys(self.module.parameters())
        if isinstance(self._loss_fn, nn.Module):
            found.update(dict.fromkeys(self._loss_fn.parameters()))
        return list(found)

    def adopted(self) -> list[Tensor]:
        """Leaves that the stage trains in this step though they are no parameters of it."""
        own = set(self.parameters())
        return [leaf for leaf in self._trained if leaf not in own]

    def begin(self, step: Step, shared: frozenset[Tensor] = frozenset()) -> None:
        """Prepares for a step; other stages hold the parameters of ``shared`` too."""
        self._step = step
        self._in_flight = {}
        self._trained = [p for p in self.parameters() if p.requires_grad]
        self._graph_searched = False
        self.accumulator.begin(frozenset(self._trained) - shared)

    def end(self) -> None:
        """Lets go of everything that belongs to the step."""
        self._step = None
        self._in_flight = {}

    def forward(self, m: int) -> None:
        """Runs microbatch ``m``, hands the result on, and keeps what its backward needs."""
        step = self._step
        step.context.apply()
        with step.context.forward():
            value, received = self._run_module(step, m)
            contributions = []
            if isinstance(value, WithLoss):
                contributions.append(self._weighted(step, m, value.loss, "the loss in WithLoss"))
                value = value.value
            if self._is_last:
                loss = self._loss_of(step, m, value)
                step.losses[m] = loss.detach()
                contributions.insert(0, self._weighted(step, m, loss, "what loss_fn returned"))
        step.contributions[self.index][m] = [c.detach() for c in contributions]
        if self._is_last:
            sent = []
            if step.keep_outputs:
                step.outputs[m] = boundary.detach(value)
        else:
            sent = boundary.differentiable(value)
            step.values[self.index + 1][m] = value
        if not self._graph_searched:
            self._graph_searched = True
            self._adopt_unregistered([*sent, *contributions], received)
        self._in_flight[m] = _InFlight(received, sent, contributions)

    def backward(self, m: int) -> None:
        """Runs microbatch ``m`` backward, hands the gradients of its input on, and adds up the others."""
        step = self._step
        step.context.apply()
        received, sent, contributions = self._in_flight.pop(m)
        outputs = [c for c in contributions if c.requires_grad]
        grads_out: list[Tensor | None] = [None] * len(outputs)  # a scalar's is 1
        for tensor, grad in zip(sent, step.grads[self.index][m]):
            if grad is not None:
                outputs.append(tensor)
                grads_out.append(grad)
        step.grads[self.index][m] = ()
        inputs = [*received, *self._trained]
        if outputs and inputs:
            with step.context.backward():
                grads = torch.autograd.grad(outputs, inputs, grads_out, allow_unused=True)
        else:
            grads = (None,) * len(inputs)
        grads_in = grads[: len(received)]
        if self.index == 0:
            step.input_grads[m] = grads_in
        else:
            step.grads[self.index - 1][m] = grads_in
        in_use = [g for g in (*grads_in, *grads_out) if g is not None]
        self.accumulator.add(self._trained, grads[len(received) :], in_use)

    def evaluate(self, m: int) -> None:
        """Runs microbatch ``m`` without gradients and hands the result on."""
        step = self._step
        step.context.apply()
        with torch.no_grad(), step.context.forward():
            value, _ = self._run_module(step, m)
        if isinstance(value, WithLoss):
            value = value.value
        if self._is_last:
            step.outputs[m] = value
        else:
            step.values[self.index + 1][m] = value

    def _run_module(self, step: Step, m: int) -> tuple[Any, list[Tensor]]:
        if self.index == 0:
            value = step.inputs[m]
            received: list[Tensor] = []
            if step.input_tensors[m]:
                value, received = boundary.receive(value)
            args, kwargs = value
        else:
            value, step.values[self.index][m] = step.values[self.index][m], None
            value, received = boundary.receive(value)
            args, kwargs = (value,), {}
        try:
            return self.module(*args, **kwargs), received
        except Exception as error:
            source = "the step" if self.index == 0 else f"stage {self.index - 1}"
            error.add_note(f"stage {self.index} was given {boundary.describe(value)} by {source}")
            raise

    def _loss_of(self, step: Step, m: int, value: Any) -> Tensor:
        if step.targets is None:
            return self._loss_fn(value)
        return self._loss_fn(value, step.targets[m])

    def _weighted(self, step: Step, m: int, loss: Any, what: str) -> Tensor:
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            raise InvalidArgument(
                f"{what} must be a tensor without dimensions, the mean or sum over the microbatch; "
                f"got {boundary.describe(loss)}"
            )
        weight = step.weights[m]
        return loss if weight == 1 else loss * weight

    def _adopt_unregistered(self, outputs: list[Tensor], received: list[Tensor]) -> None:
        """Trains leaves that the module uses but does not own, as a closure's or another stage's."""
        known = {*received, *self._trained}
        self._trained += [leaf for leaf in leaves_of_graph(outputs) if leaf not in known]
