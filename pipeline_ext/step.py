"""What the tasks of one step read and write."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .boundary import differentiable
from .context import CallerContext


class Step:
    """One step's inputs and results by microbatch. Each entry has one writer and one reader."""

    def __init__(
        self,
        *,
        num_stages: int,
        inputs: list[tuple[tuple, dict]],
        context: CallerContext,
        targets: list[Any] | None = None,
        weights: list[float] | None = None,
        keep_outputs: bool = True,
    ) -> None:
        microbatches = len(inputs)
        self.inputs = inputs
        self.context = context
        self.targets = targets
        self.weights = weights  # of each microbatch's loss in the total; None: no loss
        self.keep_outputs = keep_outputs
        # By stage: values on their way to it, gradients of its results on their way back to it, and
        # what it adds to the total loss, weighted.
        stages = range(num_stages)
        self.values: list[list[Any]] = [[None] * microbatches for _ in stages]
        self.grads: list[list[Sequence[Tensor | None]]] = [[()] * microbatches for _ in stages]
        self.contributions: list[list[Sequence[Tensor]]] = [[()] * microbatches for _ in stages]
        self.outputs: list[Any] = [None] * microbatches
        self.losses: list[Tensor | None] = [None] * microbatches  # unweighted
        # Where the inputs themselves require a gradient: the tensors, and their gradients.
        needed = differentiable(inputs[0])
        self.input_tensors: list[list[Tensor]] = (
            [differentiable(value) for value in inputs] if needed else [[]] * microbatches
        )
        self.input_grads: list[list[Tensor | None]] = [[]] * microbatches

    def total_loss(self) -> Tensor:
        """Sum of all contributions: microbatch by microbatch, in each the loss, then the stages' own."""
        *earlier, last = self.contributions
        total = 0
        for m, contributions in enumerate(last):
            of_m = sum(contributions)
            for stage in earlier:
                for contribution in stage[m]:
                    of_m = of_m + contribution
            total = total + of_m
        return total

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
