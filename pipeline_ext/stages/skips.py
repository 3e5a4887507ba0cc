"""A stage's ends of skip connections: what it gets of earlier stages, and what it leaves for later ones."""

from collections.abc import Sequence

from torch import Tensor

from ..model.skips import NamedSkip, Scope
from ..transport.exchange import Exchange
from .boundary import Entrance, Received


class StageSkips:
    """Of all skips those that begin or end at one stage and not at both."""

    def __init__(self, stage: int, skips: Sequence[NamedSkip]) -> None:
        self._stage = stage
        # Where several begin with one tensor, plain autograd adds the gradient of the last to be used first.
        ways_out = [skip for skip in skips if skip.source == stage != skip.target]
        self._stashes = [skip.name for skip in sorted(ways_out, key=lambda skip: -skip.target)]
        self._entrances = {skip.name: Entrance() for skip in skips if skip.target == stage != skip.source}

    def begin(self) -> None:
        """Prepares for a step."""
        for entrance in self._entrances.values():
            entrance.begin()

    def failed(self) -> None:
        """A forward has raised an error."""
        for entrance in self._entrances.values():
            entrance.failed()

    def receive(self, exchange: Exchange, m: int) -> Scope:
        """What the stage's forward can pop of microbatch ``m``, as it was sent."""
        return Scope({name: exchange.receive_skip(self._stage, name, m) for name in self._entrances})

    def enter(self, scope: Scope) -> list[list[Received]]:
        """Cuts it from autograd; returns what will hold the gradients, none of a tensor that requires none."""
        found = []
        for name, entrance in self._entrances.items():
            scope[name], received = entrance.receive(scope[name])
            found.append(received)
        return found

    def send(self, exchange: Exchange, m: int, scope: Scope) -> list[Tensor]:
        """Sends what the forward has stashed for later stages, and returns it."""
        tensors = scope.take(self._stashes)
        for name, tensor in zip(self._stashes, tensors):
            exchange.send_skip(self._stage, name, m, tensor)
        return tensors

    def receive_gradients(self, exchange: Exchange, m: int) -> list[Tensor | None]:
        """The gradients of what ``send`` has returned."""
        return [exchange.receive_skip_gradient(self._stage, name, m) for name in self._stashes]

    def send_gradients(self, exchange: Exchange, m: int, entered: list[list[Received]]) -> None:
        """Sends the gradients of what ``enter`` has returned back."""
        for (name, entrance), received in zip(self._entrances.items(), entered):
            entrance.returned(received)
            gradients = [tensor.gradient() for tensor in received]
            exchange.send_skip_gradient(self._stage, name, m, *(gradients or [None]))
