"""A stage's ends of skip connections: what it receives from earlier stages and sends to later ones."""

from collections.abc import Sequence

from torch import Tensor

from ..model.skips import NamedSkip, Scope
from ..transport.exchange import Exchange
from .boundary import Entrance, Received


class StageSkips:
    """The skips that begin or end at one stage, without those that do both there."""

    def __init__(self, stage: int, skips: Sequence[NamedSkip]) -> None:
        self._stage = stage
        # If several begin with one tensor, plain autograd first adds the gradient of the one used last.
        outgoing = [skip for skip in skips if skip.source == stage != skip.target]
        self._stashes = [skip.name for skip in sorted(outgoing, key=lambda skip: -skip.target)]
        self._entrances = {skip.name: Entrance() for skip in skips if skip.target == stage != skip.source}

    def begin(self) -> None:
        """Prepares for a step."""
        for entrance in self._entrances.values():
            entrance.begin()

    def failed(self) -> None:
        """Called when a forward raised an error."""
        for entrance in self._entrances.values():
            entrance.failed()

    def receive(self, exchange: Exchange, m: int) -> Scope:
        """What the stage's forward can pop for microbatch ``m``, as it was sent."""
        return Scope({name: exchange.receive_skip(self._stage, name, m) for name in self._entrances})

    def enter(self, scope: Scope) -> list[list[Received]]:
        """Detaches the tensors from the sender's graph; returns what will hold their gradients, by skip.

        A tensor that requires no gradient has nothing there.
        """
        found = []
        for name, entrance in self._entrances.items():
            scope[name], received = entrance.receive(scope[name])
            found.append(received)
        return found

    def send(self, exchange: Exchange, m: int, scope: Scope) -> list[Tensor]:
        """Sends what the forward stashed for later stages, and returns it."""
        tensors = scope.take(self._stashes)
        for name, tensor in zip(self._stashes, tensors):
            exchange.send_skip(self._stage, name, m, tensor)
        return tensors

    def receive_gradients(self, exchange: Exchange, m: int) -> list[Tensor | None]:
        """The gradients of what ``send`` returned."""
        return [exchange.receive_skip_gradient(self._stage, name, m) for name in self._stashes]

    def send_gradients(self, exchange: Exchange, m: int, entered: list[list[Received]]) -> None:
        """Sends back the gradients that ``entered``, which ``enter`` returned, holds by now."""
        for (name, entrance), received in zip(self._entrances.items(), entered):
            entrance.returned(received)
            gradients = [tensor.gradient() for tensor in received]
            exchange.send_skip_gradient(self._stage, name, m, *(gradients or [None]))
