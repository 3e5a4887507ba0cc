"""What one stage returns as what the next one is given."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import fx
from torch.distributed.pipelining.stage import _PipelineStage, _PipelineStageBase

from ..errors import InvalidArgument


class Link(Protocol):
    """The way into a stage, and out of it."""

    def arguments(self, value: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The module's, from what came over the boundary and what the stage's own process gave by name."""

    def value(self, output: Any, came: Any) -> Any:
        """What crosses the next boundary. ``came``: what crossed the one before; None for the first stage."""


def link_of(stage: _PipelineStageBase) -> Link:
    """The link for stages made by hand, or traced."""
    return TracedLink(stage) if isinstance(stage, _PipelineStage) else ChainLink()


class ChainLink:
    """A stage takes what the one before returned; the parts of a tuple or list as arguments of their own."""

    def arguments(self, value: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return tuple(value) if type(value) in (tuple, list) else (value,), kwargs

    def value(self, output: Any, came: Any) -> Any:
        return output


class TracedLink:
    """A stage of a traced model takes what its graph says, from any stage before.

    What a later stage needs passes through those between.
    """

    def __init__(self, stage: _PipelineStage) -> None:
        calls = [node for node in stage.pipe_info.graph.nodes if node.op == "call_module"]
        self._call = stage.node
        self._coming = _crossing(calls, stage.stage_index - 1)
        self._leaving = _crossing(calls, stage.stage_index)

    def arguments(self, value: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        came, given = dict(zip(self._coming, value)), dict(kwargs)
        args = tuple(came[node] if node in came else self._input(node, given) for node in self._call.args)
        return args, given

    def value(self, output: Any, came: Any) -> Any:
        passing = dict(zip(self._coming, came or ()))
        return tuple(
            passing[node] if node in passing else output if node is self._call else output[node.args[1]]
            for node in self._leaving
        )

    def _input(self, node: fx.Node, given: dict[str, Any]) -> Any:
        """An input of the whole model that a later stage takes itself."""
        if node.target not in given:
            raise InvalidArgument(
                f"{self._call.name} takes the model's input {node.target!r} itself; give it to step by this "
                "name in the process that holds this stage"
            )
        return given.pop(node.target)


def _crossing(calls: Sequence[fx.Node], boundary: int) -> list[fx.Node]:
    """What stages up to ``boundary`` make, and later ones take: calls, or parts of what they return."""
    later = set(calls[boundary + 1 :])
    parts = [
        part
        for call in calls[: boundary + 1]
        for part in (call, *(user for user in call.users if user not in calls))
    ]
    return [part for part in parts if later & set(part.users)]
