"""Channels of skip connections: a tensor from a stage to a later one, and its gradient back."""

from torch import Tensor

from ..errors import PipelineError
from .channel import Channel
from .description import Leaves
from .direction import Direction, FromProcess


class SkipChannels:
    """The channels of all skip connections, by name.

    Where stages are on different devices, the task that receives copies what it receives.

    Attributes:
        forward, backward: each channel carries one tensor, or None, of each microbatch.
    """

    def __init__(self, forward: Direction[str], backward: Direction[str]) -> None:
        self.forward = forward
        self.backward = backward
        self.end()

    def end(self) -> None:
        """Forgets what a failed step has left."""
        self._sent: dict[
            tuple[str, int], tuple[Tensor, int]
        ] = {}  # by name and microbatch, with its version then

    def send(self, name: str, m: int, tensor: Tensor) -> None:
        """Sends what microbatch ``m`` stashed."""
        channel = self.forward.sending[name]
        if isinstance(channel, Channel):
            self._sent[name, m] = tensor, _version(tensor)
        channel.send(m, (tensor,))

    def receive(self, name: str, m: int) -> Tensor:
        """What microbatch ``m`` pops.

        Raises PipelineError if a stage in between changed it in place, which autograd cannot detect across
        stages.
        """
        channel = self.forward.receiving[name]
        tensor: Tensor
        (tensor,) = _fetch(channel, m)
        if not isinstance(channel, Channel):
            return tensor
        sent, version = self._sent.pop((name, m))
        if _version(sent) != version:
            raise PipelineError(
                f"the tensor stashed as {name!r} was changed in place by a stage that was handed the "
                "same memory; stash a clone, or change a clone"
            )
        return tensor

    def send_gradient(self, name: str, m: int, gradient: Tensor | None) -> None:
        """Sends the gradient of what microbatch ``m`` popped back."""
        self.backward.sending[name].send(m, (gradient,))

    def receive_gradient(self, name: str, m: int) -> Tensor | None:
        """The gradient of what microbatch ``m`` stashed."""
        gradient: Tensor | None
        (gradient,) = _fetch(self.backward.receiving[name], m)
        return gradient


def _fetch(channel: Channel | FromProcess, m: int) -> Leaves:
    if isinstance(channel, Channel):
        channel.transfer(m)
    return channel.receive(m)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
