"""Both ways of a skip connection."""

from torch import Tensor

from ..errors import PipelineError
from .channel import Channel
from .remote import Incoming, Outgoing

AnyChannel = Channel | Outgoing | Incoming | None


class SkipChannel:
    """Carries a tensor of each microbatch from a stage to a later one, and its gradient back.

    Attributes:
        forward, backward: the channels, which hold one tensor, or None, for each microbatch; None between two
            other processes.
    """

    def __init__(self, name: str, forward: AnyChannel, backward: AnyChannel) -> None:
        self.forward = forward
        self.backward = backward
        self._name = name
        self._here = [c for c in (forward, backward) if c is not None]
        self._sent: dict[int, tuple[Tensor, int]] = {}  # with their versions then

    def begin(self) -> None:
        """Prepares for a step."""
        self.end()
        for channel in self._here:
            if not isinstance(channel, Incoming):  # which begins with the whole step
                channel.begin()

    def forget(self) -> None:
        """Packs the next step as the first."""
        for channel in self._here:
            if isinstance(channel, Channel):
                channel.forget()

    def end(self) -> None:
        """Lets go of what a step that failed has left on its way."""
        self._sent = {}
        for channel in self._here:
            channel.end()

    def send(self, m: int, tensor: Tensor) -> None:
        """Takes what microbatch ``m`` stashed."""
        if isinstance(self.forward, Channel):
            self._sent[m] = tensor, _version(tensor)
        self.forward.send(m, (tensor,))

    def receive(self, m: int) -> Tensor:
        """What microbatch ``m`` pops.

        Raises PipelineError where a stage between has changed it in place: autograd cannot follow that there.
        """
        (tensor,) = self.forward.receive(m)
        if isinstance(self.forward, Incoming):
            return tensor
        sent, version = self._sent.pop(m)
        if _version(sent) != version:
            raise PipelineError(
                f"the tensor stashed as {self._name!r} was changed in place by a stage that was handed the "
                "same memory; stash a clone, or change a clone"
            )
        return tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
