"""How the output of one stage becomes the arguments of the next."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import fx
from torch.distributed.pipelining.stage import _PipelineStage, _PipelineStageBase

from ..errors import InvalidArgument


class Dataflow(Protocol):
    """What a stage takes from the boundary before it, and what it sends over the boundary after it."""

    def arguments(self, received: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The module's arguments.

        ``received`` came over the boundary, ``kwargs`` were given to ``step`` in the stage's own process.
        """

    def sent(self, output: Any, received: Any) -> Any:
        """What crosses the next boundary; ``received`` is None for the first stage."""


def dataflow_of(stage: _PipelineStageBase) -> Dataflow:
    """The data flow of a stage that was made by hand, or traced."""
    return TracedDataflow(stage) if isinstance(stage, _PipelineStage) else SequentialDataflow()


class SequentialDataflow:
    """A stage takes what the stage before returned; a tuple or list is spread over its arguments."""

    def arguments(self, received: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tuple(received) if type(received) in (tuple, list) else (received,), kwargs

    def sent(self, output: Any, received: Any) -> Any:
        return output


class TracedDataflow:
    """A stage of a traced model takes what the model's graph says, from any earlier stage.

    The stages in between pass on what only a later stage needs.
    """

    def __init__(self, stage: _PipelineStage) -> None:
        calls = [node for node in stage.pipe_info.graph.nodes if node.op == "call_module"]
        self._call = stage.node
        self._received = _crossing(calls, stage.stage_index - 1)
        self._sent = _crossing(calls, stage.stage_index)

    def arguments(self, received: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        values, unused = dict(zip(self._received, received)), dict(kwargs)
        args = tuple(
            values[node] if node in values else self._model_input(node, unused) for node in self._call.args
        )
        return args, unused

    def sent(self, output: Any, received: Any) -> Any:
        passed_on = dict(zip(self._received, received or ()))
        return tuple(
            passed_on[node] if node in passed_on else output if node is self._call else output[node.args[1]]
            for node in self._sent
        )

    def _model_input(self, node: fx.Node, kwargs: dict[str, Any]) -> Any:
        """Takes an input of the whole model, which a later stage uses itself, out of ``kwargs``."""
        if node.target not in kwargs:
            raise InvalidArgument(
                f"{self._call.name} takes the model's input {node.target!r} itself; give it to step by this "
                "name in the process that holds this stage"
            )
        return kwargs.pop(node.target)


def _crossing(calls: Sequence[fx.Node], boundary: int) -> list[fx.Node]:
    """What stages up to ``boundary`` compute and later stages use: calls, or parts of their output."""
    later = set(calls[boundary + 1 :])
    parts = [
        part
        for call in calls[: boundary + 1]
        for part in (call, *(user for user in call.users if user not in calls))
    ]
    return [part for part in parts if later & set(part.users)]
