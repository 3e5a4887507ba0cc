"""What the tasks of one step read and write."""

import functools
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.tensors import differentiable
from ..errors import PipelineError
from ..transport.exchange import Exchange
from . import microbatch
from .context import CallerContext


class Step:
    """One step's inputs and results by microbatch. Each entry has one writer and one reader."""

    def __init__(
        self,
        *,
        exchange: Exchange,
        microbatches: int,
        rows: int | None,
        context: CallerContext,
        inputs: list[tuple[tuple, dict]] | None = None,
        targets: list[Any] | None = None,
        target_rows: int | None = None,
        weighted: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        keep_outputs: bool = True,
    ) -> None:
        """``rows`` of the batch, and ``inputs``: None where another process has the first stage.

        ``weighted``: by its share of the rows is how a microbatch's loss enters the total.
        """
        self.exchange = exchange
        self.inputs = inputs
        self.context = context
        self.targets = targets
        self._target_rows = target_rows
        self._rows = rows
        self._lengths = [0] * microbatches if rows is None else microbatch.lengths(rows, microbatches)
        self._weighted = weighted
        self._scaler = scaler
        self._loss: Tensor | None = None  # the total, as another process has told it
        self.keep_outputs = keep_outputs
        self.has_trained = False  # whether any backward had something to differentiate
        # By stage: what it adds to the total loss, weighted.
        self.contributions: list[list[Sequence[Tensor]]] = [
            [()] * microbatches for _ in range(exchange.num_stages)
        ]
        self.outputs: list[Any] = [None] * microbatches
        self.losses: list[Tensor | None] = [None] * microbatches  # unweighted
        # Where the inputs themselves require a gradient: the tensors, and their gradients.
        needed = bool(inputs) and differentiable(inputs[0])
        self.input_tensors: list[list[Tensor]] = (
            [differentiable(value) for value in inputs] if needed else [[]] * microbatches
        )
        self.input_grads: list[list[Tensor | None]] = [[]] * microbatches

    def weighted(self, loss: Tensor, m: int) -> Tensor:
        """Microbatch ``m``'s loss as it enters the total."""
        weight = self._weight(m)
        return loss if weight == 1 else loss * weight

    def weight_like(self, loss: Tensor, m: int) -> Tensor:
        """The gradient of the total, scaled where there is a scaler, in microbatch ``m``'s loss."""
        # Made anew each time: autograd may keep it as a parameter's gradient, and add to it.
        weight = torch.full((), self._weight(m), dtype=loss.dtype, device=loss.device)
        return weight if self._scaler is None else self._scaler.scale(weight).to(loss.dtype)

    def _weight(self, m: int) -> float:
        return self._lengths[m] / self._rows if self._weighted else 1

    def passed_on(self, stage: int, m: int) -> list[Any]:
        """What goes along with microbatch ``m`` from ``stage`` to another process."""
        added = itertools.chain.from_iterable(of_stage[m] for of_stage in self.contributions[: stage + 1])
        return [self._rows, self._lengths[m], *added]

    def take_in(self, stage: int, m: int, known: list[Any]) -> None:
        """Takes what has come along with microbatch ``m`` to ``stage``. Raises PipelineError."""
        self._rows, self._lengths[m], *added = known
        if self._target_rows not in (None, self._rows):
            raise PipelineError(
                f"target has {self._target_rows} rows where the batch has {self._rows}; give the process with "
                "the last stage the target of the batch that the one with the first stage is given"
            )
        for before in self.contributions[:stage]:
            before[m] = ()
        self.contributions[0][m] = added

    def known_loss(self) -> Tensor | None:
        """The total loss, or what another process has told of it."""
        return self._loss if self._loss is not None else self.total_loss()

    def learn_loss(self, loss: Tensor) -> None:
        """Another process has told the total loss."""
        self._loss = loss.detach().clone()

    def total_loss(self) -> Tensor:
        """Sum of all contributions: microbatch by microbatch, in each the loss, then the stages' own."""
        *earlier, last = self.contributions
        device = last[0][0].device
        by_microbatch = [
            functools.reduce(
                operator.add,
                (
                    loss if loss.device == device else loss.to(device)
                    for loss in itertools.chain(losses, *(stage[m] for stage in earlier))
                ),
            )
            for m, losses in enumerate(last)
        ]
        return functools.reduce(operator.add, by_microbatch).clone()  # of one, it is losses[0] itself

    def backward_into_inputs(self) -> None:
        """Carries the gradients of the step's inputs on into the graph that made them."""
        pairs = [
            (tensor, grad)
            for tensors, grads in zip(self.input_tensors, self.input_grads)
            for tensor, grad in zip(tensors, grads)
            if grad is not None
        ]
        if pairs:
            tensors, grads = zip(*pairs)
            torch.autograd.backward(tensors, grads)
