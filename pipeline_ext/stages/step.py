"""The data that the tasks of one step read and write."""

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
from .activation_memory import ActivationMemory
from .context import CallerContext
from .finite import Watch
from .loss_means import Mean
from .random_streams import NoStreams, StepStreams


class Step:
    """One step's inputs and results by microbatch. Each entry has one writer and one reader."""

    def __init__(
        self,
        *,
        exchange: Exchange,
        microbatches: int,
        rows: Sequence[int] | None,
        context: CallerContext,
        inputs: list[tuple[tuple, dict]] | None = None,
        targets: list[Any] | None = None,
        target_rows: int | None = None,
        weighted: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        keep_outputs: bool = True,
        random: StepStreams | None = None,
        watch: Watch | None = None,
        looks_at_means: bool = False,
    ) -> None:
        """``rows`` of each microbatch, and ``inputs``: None if another process has the first stage.

        ``weighted``: scale each microbatch's loss by its share of the batch's rows. ``looks_at_means``: which
        is right only if the means in the losses are over rows; keep what they are over.
        """
        self.exchange = exchange
        self.inputs = inputs
        self.random = random or NoStreams()
        self.watch = watch
        self.context = context
        self.targets = targets
        self._target_rows = target_rows
        self._rows = None if rows is None else sum(rows)
        self._lengths = [0] * microbatches if rows is None else list(rows)
        self._weighted = weighted
        self.loss_weights: list[float] | None = None  # of what loss_fn returns, if not by rows
        self._scaler = scaler
        self._loss: Tensor | None = None  # the total, if another process sent it
        self.keep_outputs = keep_outputs
        self.memory: ActivationMemory | None = None  # which measures what stages keep
        self.has_trained = False  # whether any backward had something to differentiate
        # By stage and microbatch: what the stage adds to the total loss, weighted.
        self.contributions: list[list[Sequence[Tensor]]] = [
            [()] * microbatches for _ in range(exchange.num_stages)
        ]
        self.outputs: list[Any] = [None] * microbatches
        self.losses: list[Tensor | None] = [None] * microbatches  # unweighted
        self.means: list[list[Mean]] | None = [[] for _ in range(microbatches)] if looks_at_means else None
        # By microbatch: the input tensors that require a gradient, and their gradients.
        needed = inputs and differentiable(inputs[0])
        self.input_tensors: list[list[Tensor]] = (
            [differentiable(value) for value in inputs] if inputs and needed else [[]] * microbatches
        )
        self.input_grads: list[list[Tensor | None]] = [[]] * microbatches

    def gradient_of(self, loss: Tensor, weight: float) -> Tensor:
        """The gradient of the total with respect to a loss of this weight, scaled if there is a scaler."""
        # A new tensor each time: autograd may keep it as a parameter's gradient, and add to it.
        gradient = torch.full((), weight, dtype=loss.dtype, device=loss.device)
        return gradient if self._scaler is None else self._scaler.scale(gradient).to(loss.dtype)

    def loss_weight(self, m: int) -> float:
        """The weight of what ``loss_fn`` returns for microbatch ``m``."""
        return self.weight(m) if self.loss_weights is None else self.loss_weights[m]

    def weight(self, m: int) -> float:
        """The weight of what else adds to the loss of microbatch ``m``."""
        if not self._weighted:
            return 1
        assert self._rows is not None  # known since the first microbatch came
        return self._lengths[m] / self._rows

    def passed_on(self, stage: int, m: int) -> list[Any]:
        """What is sent along with microbatch ``m`` from ``stage`` to another process."""
        added = itertools.chain.from_iterable(of_stage[m] for of_stage in self.contributions[: stage + 1])
        seeds = [torch.tensor(self.random.base, device="cpu")] if self.random.travels else []
        return [self._rows, self._lengths[m], *seeds, *added]

    def take_in(self, stage: int, m: int, known: list[Any]) -> None:
        """Takes over what came along with microbatch ``m`` to ``stage``.

        Raises PipelineError if the target has another number of rows than the batch.
        """
        self._rows, self._lengths[m], *added = known
        if self.random.travels:
            base, *added = added
            self.random.base = int(base)
        if self._target_rows not in (None, self._rows):
            raise PipelineError(
                f"target has {self._target_rows} rows where the batch has {self._rows}; give the process with "
                "the last stage the target of the batch that the process with the first stage gets"
            )
        for before in self.contributions[:stage]:
            before[m] = ()
        self.contributions[0][m] = added

    def known_loss(self) -> Tensor | None:
        """The total loss, computed here or sent by another process."""
        return self._loss if self._loss is not None else self.total_loss()

    def learn_loss(self, loss: Tensor) -> None:
        """Takes over the total loss that another process sent."""
        self._loss = loss.detach().clone()

    def total_loss(self) -> Tensor:
        """The sum of all contributions: for each microbatch first the loss, then what stages add to it."""
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
        # A clone, because the sum of one microbatch is losses[0] itself.
        return functools.reduce(operator.add, by_microbatch).clone()

    def backward_into_inputs(self) -> None:
        """Continues the backward from the step's inputs into the graph that made them."""
        pairs = [
            (tensor, grad)
            for tensors, grads in zip(self.input_tensors, self.input_grads)
            for tensor, grad in zip(tensors, grads)
            if grad is not None
        ]
        if pairs:
            tensors, grads = zip(*pairs)
            torch.autograd.backward(tensors, grads)
