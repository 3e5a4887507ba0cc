"""The inputs and results of one step of a torch schedule."""

from typing import Any

from ..stages.context import CallerContext
from ..stages.step import Step
from ..transport.exchange import Exchange


class TorchStep(Step):
    """A step whose batch is already cut into microbatches; each process has those that it was given."""

    inputs: list[tuple[tuple, dict[str, Any]]]

    def __init__(
        self,
        exchange: Exchange,
        context: CallerContext,
        inputs: list[tuple[tuple, dict[str, Any]]],
        weights: list[float],
        keep_outputs: bool,
    ) -> None:
        """``weights`` scale each microbatch's loss, in the process of the last stage."""
        super().__init__(
            exchange=exchange,
            microbatches=len(inputs),
            rows=None,
            context=context,
            inputs=inputs,
            keep_outputs=keep_outputs,
        )
        self._weights = weights

    def weight(self, m: int) -> float:
        return self._weights[m]

    def passed_on(self, stage: int, m: int) -> list[Any]:
        """Nothing: each process knows what it needs."""
        return []

    def take_in(self, stage: int, m: int, known: list[Any]) -> None:
        """Ignores ``known``, which is empty."""

    def known_loss(self) -> None:
        """None: losses stay in the process of the last stage."""
