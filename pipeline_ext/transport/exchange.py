"""All channels between the stages of a plan."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _C
from .channel import Channel, Passage
from .link import FREE_LINK, LocalLink
from .remote import Incoming, Outgoing, Receiver

if TYPE_CHECKING:
    from ..step import Step


class Messages(NamedTuple):
    """What crossed a boundary in one direction in one step."""

    boundary: int  # between this stage and the next
    direction: str  # "forward": activations, "backward": gradients
    count: int
    packed_nbytes: int  # 0 where the results were handed over
    result_nbytes: int  # of the first microbatch
    seconds: float  # that the link spent on them


class Exchange:
    """What the stages of a plan give one another: activations forward, gradients backward.

    Between stages of one rank nothing is packed, and there are no messages. What goes to another process takes
    along what is known here of the step: how many rows there are, and what stages have added to the loss.
    """

    def __init__(
        self,
        plan: _C.Plan,
        wire: Sequence[torch.dtype | None] = (),
        wire_forward: Sequence[torch.dtype | None] = (),
        link: LocalLink = FREE_LINK,
        passage_of: Callable[[int, str], Passage] | None = None,
        ends: Callable[..., Callable[[int, str], Outgoing | Incoming | None]] | None = None,
    ) -> None:
        """``wire`` and ``wire_forward``: types of gradients and activations by boundary; empty: their own.

        ``passage_of``: of ranks on streams of devices, what looks after the memory of activations ("F") or
        gradients ("B") that cross a boundary.

        ``ends``: of ranks that are processes, given the wires makes what finds this one's end of a way, if it
        has one.
        """
        self.num_stages = plan.num_stages
        self._trains = plan.has_backward
        ranks = plan.rank_of_stage
        self._crossing = [a != b for a, b in zip(ranks, ranks[1:])]
        end_of = None if ends is None else ends(wire, wire_forward)

        def channel(
            boundary: int, way: str, pack: int, wires: Sequence[torch.dtype | None]
        ) -> Channel | Outgoing | Incoming | None:
            if end_of is not None and self._crossing[boundary]:
                return end_of(boundary, way)
            passage = None if passage_of is None else passage_of(boundary, way)
            if not self._crossing[boundary]:
                return Channel(plan.num_microbatches, passage=passage)
            wire = wires[boundary] if wires else None
            # Activations are in use as long as the receiver's microbatch is in flight, gradients as long as
            # theirs is; both are the stage's that holds more.
            in_flight = plan.limits[boundary]
            return Channel(plan.num_microbatches, pack, wire, in_flight, link, passage)

        self._forward = [channel(b, "F", k, wire_forward) for b, k in enumerate(plan.packs_forward)]
        self._backward = [channel(b, "B", k, wire) for b, k in enumerate(plan.packs)]
        self._here = [c for c in (*self._forward, *self._backward) if c is not None]
        self._remote = [c for c in self._here if isinstance(c, (Outgoing, Incoming))]
        self._releasing = [  # by stage: the channels to it whose results lie in buffers
            [
                c
                for c in (*self._forward[max(s - 1, 0) : s], *self._backward[s : s + 1])
                if c is not None and not c.hands_over and not isinstance(c, Outgoing)
            ]
            for s in range(plan.num_stages)
        ]
        self._step: Step | None = None

    @property
    def packs(self) -> bool:
        """Whether any results are packed, not handed over."""
        return any(not channel.hands_over for channel in self._here)

    def begin(self, step: "Step") -> None:
        """Prepares for a step."""
        self._step = step
        for channel in self._here:
            if isinstance(channel, Incoming):
                continue  # it begins with ``listen``
            channel.begin()
            if not self._trains and isinstance(channel, Channel):
                channel.forget()  # an evaluation does not depend on those before

    def listen(self, receiver: Receiver) -> None:
        """From now on ``receiver`` is told what comes from other processes."""
        for channel in self._remote:
            if isinstance(channel, Incoming):
                channel.begin(receiver)

    def awaited(self) -> list[str]:
        """What has not come from other processes, for people."""
        waiting = (c.waiting() for c in self._remote if isinstance(c, Incoming))
        return [text for text in waiting if text]

    def give_up(self) -> None:
        """After a failure: lets no process wait for what does not come."""
        for channel in self._remote:
            channel.give_up()

    def flush(self, timeout: float) -> None:
        """Returns when other processes have what was sent them, or after ``timeout`` seconds."""
        for channel in self._remote:
            if isinstance(channel, Outgoing):
                channel.flush(timeout)

    def close(self, timeout: float) -> None:
        """Does that, and ends threads."""
        self.flush(timeout)
        for channel in self._remote:
            if isinstance(channel, Incoming):
                channel.close(timeout)

    def end(self) -> None:
        """Lets go of what a step that failed has left on its way."""
        for channel in self._here:
            channel.end()
        self._step = None

    def messages(self) -> list[Messages]:
        """What the step has sent between ranks."""
        return [
            Messages(b, way, c.sent, c.packed_nbytes, c.result_nbytes, c.seconds)
            for way, channels in (("forward", self._forward), ("backward", self._backward))
            for b, c in enumerate(channels)
            if self._crossing[b] and c is not None and not isinstance(c, Incoming)
        ]

    def send_value(self, stage: int, m: int, value: Any) -> None:
        """Sends what ``stage`` has made of microbatch ``m`` on to the next stage."""
        channel = self._forward[stage]
        if channel.hands_over:
            channel.send(m, (value,))
        else:
            if isinstance(channel, Outgoing):
                value = (value, self._step.passed_on(stage, m))
            leaves, spec = pytree.tree_flatten(value)
            channel.send(m, [*leaves, spec])

    def carry_value(self, stage: int, m: int) -> None:
        """Takes what ``stage`` has sent on to the next stage's device, if that is another."""
        self._forward[stage].carry(m)

    def carry_gradients(self, stage: int, m: int) -> None:
        """Takes the gradients that ``stage`` has sent back to the device of the stage before."""
        self._backward[stage - 1].carry(m)

    def receive_value(self, stage: int, m: int) -> Any:
        """What the stage before has sent to ``stage``."""
        channel = self._forward[stage - 1]
        *leaves, last = channel.receive(m)
        if channel.hands_over:
            return last
        value = pytree.tree_unflatten(leaves, last)
        if isinstance(channel, Incoming):
            value, known = value
            self._step.take_in(stage, m, known)
        return value

    def send_gradients(self, stage: int, m: int, gradients: list[Tensor | None]) -> None:
        """Sends the gradients of what ``stage`` was sent back to the stage before."""
        channel = self._backward[stage - 1]
        if isinstance(channel, Outgoing):
            # By the last message the last stage has run all forwards: the loss is known.
            gradients = [*gradients, self._step.known_loss() if channel.completes(m) else None]
        channel.send(m, gradients)

    def receive_gradients(self, stage: int, m: int) -> Sequence[Tensor | None]:
        """The gradients of what ``stage`` has sent; of the last stage none."""
        if stage == len(self._backward):
            return ()
        channel = self._backward[stage]
        gradients = channel.receive(m)
        if isinstance(channel, Incoming):
            *gradients, loss = gradients
            if loss is not None:
                self._step.learn_loss(loss)
        return gradients

    def release(self, stage: int, m: int) -> None:
        """``stage`` needs no more what its neighbours have sent it of microbatch ``m``."""
        for channel in self._releasing[stage]:
            channel.release(m)
