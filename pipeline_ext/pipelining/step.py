"""What the tasks of one step of a torch schedule read and write."""

from typing import Any

from ..stages.context import CallerContext
from ..stages.step import Step
from ..transport.exchange import Exchange


class TorchStep(Step):
    """A step whose microbatches were cut before, in each process those it was given."""

    def __init__(
        self,
        exchange: Exchange,
        context: CallerContext,
        inputs: list[tuple[tuple, dict[str, Any]]],
        weights: list[float],
        keep_outputs: bool,
    ) -> None:
        """``weights``: of each microbatch's loss, where the last stage is."""
        super().__init__(
            exchange=exchange,
            microbatches=len(inputs),
            rows=None,
            context=context,
            inputs=inputs,
            keep_outputs=keep_outputs,
        )
        self._weights = weights

    def _weight(self, m: int) -> float:
        return self._weights[m]

    def passed_on(self, stage: int, m: int) -> list[Any]:
        """Nothing: each process knows what it needs."""
        return []

    def take_in(self, stage: int, m: int, known: list[Any]) -> None:
        """Nothing has come along."""

    def known_loss(self) -> None:
        """Losses stay where the last stage is."""
