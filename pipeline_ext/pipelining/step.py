"""What the tasks of one step of a torch schedule read and write."""

from typing import Any

from ..context import CallerContext
from ..step import Step
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
            exchange=exchange, inputs=inputs, context=context, weights=weights, keep_outputs=keep_outputs
        )
        self._weights = weights
