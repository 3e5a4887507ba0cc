"""What the stages of a plan send one another."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from .. import _C
from ..base.flat import flatten, unflatten
from ..plan.records import Messages
from .channel import Channel
from .decisions import DecisionReceiver, DecisionSender
from .direction import FromProcess, ToProcess
from .dtensors import Meshes, from_local, to_local
from .format import Format
from .link import FREE_LINK, LocalLink
from .make_channels import ChannelMaker, RemoteChannelOf, StreamMemoryOf, WireTypes
from .remote_receiver import Listener, RemoteReceiver
from .remote_sender import RemoteSender
from .skip_channels import SkipChannels
from .stream_remote import StreamReceiver, StreamSender


class StepData(Protocol):
    """What other processes need to know of the step that runs; it is sent along with results."""

    def passed_on(self, stage: int, m: int) -> list[Any]: ...

    def take_in(self, stage: int, m: int, known: list[Any]) -> None: ...

    def known_loss(self) -> Tensor | None: ...

    def learn_loss(self, loss: Tensor) -> None: ...


class Exchange:
    """Sends activations forward and gradients backward between the stages of a plan.

    They cross the boundaries between neighbors, and skip connections. Between stages of one rank nothing is
    packed or counted as a message. Messages to another process also carry the row count and the losses so far.
    """

    def __init__(
        self,
        plan: _C.Plan,
        wire: WireTypes = (),
        wire_forward: WireTypes = (),
        link: LocalLink = FREE_LINK,
        stream_memory_of: StreamMemoryOf | None = None,
        skips: Sequence[str] = (),
        remote_channel_of: RemoteChannelOf | None = None,
        decisions: DecisionSender | DecisionReceiver | None = None,
    ) -> None:
        """``wire`` and ``wire_forward``: types of gradients and activations by boundary; empty: their own.

        ``stream_memory_of``: for ranks on device streams, what manages the memory of what one stage sends to
        another, over a skip or across a boundary.

        ``skips``: names of the plan's skips. A skip is cast to the wire type of its sender's boundary.

        ``remote_channel_of``: for ranks that are processes, the sender or receiver of this process between two
        stages; None if neither stage is here.

        ``decisions``: this process's side, where one of several processes decides the order of their tasks.
        """
        self.num_stages = plan.num_stages
        self._trains = plan.has_backward
        make = ChannelMaker(plan, wire, wire_forward, link, stream_memory_of, remote_channel_of)
        self._forward, self._backward = make.at_boundaries(True), make.at_boundaries(False)
        self._skips = SkipChannels(make.of_skips(skips, True), make.of_skips(skips, False))
        directions = (self._forward, self._backward, self._skips.forward, self._skips.backward)
        self._channels = [channel for direction in directions for channel in direction.channels]
        others = [*self._channels, decisions]
        self._senders = [c for c in others if isinstance(c, RemoteSender | DecisionSender)]
        self._receivers = [c for c in others if isinstance(c, RemoteReceiver | DecisionReceiver)]
        self._boundaries_between_ranks = [
            b for b in range(plan.num_stages - 1) if make.is_between_ranks(b, b + 1)
        ]
        self._skips_between_ranks = [
            (name, skip)
            for name, skip in zip(skips, plan.skips)
            if make.is_between_ranks(skip.source, skip.target)
        ]
        received = [
            [self._forward.receiving.get(stage - 1), self._backward.receiving.get(stage)]
            for stage in range(plan.num_stages)
        ]
        for name, skip in zip(skips, plan.skips):
            received[skip.target].append(self._skips.forward.receiving.get(name))
            received[skip.source].append(self._skips.backward.receiving.get(name))
        self._releasing = [  # by stage: the channels whose results lie in receive buffers
            [c for c in channels if c is not None and not c.hands_over] for channels in received
        ]
        self._step: StepData | None = None

    @property
    def step(self) -> StepData:
        """The step that runs."""
        assert self._step is not None
        return self._step

    @property
    def packs_for_others(self) -> bool:
        """Whether a packer writes or reads any messages between the GPUs of processes."""
        return any(c.packs for c in self._channels if isinstance(c, StreamSender | StreamReceiver))

    @property
    def formats(self) -> list[Format]:
        """Those of the last step's messages within this process: they own tables that GPUs read."""
        return [format for c in self._channels if isinstance(c, Channel) for format in c.formats]

    def begin(self, step: StepData) -> None:
        """Prepares for a step."""
        self._step = step
        self._skips.end()
        for channel in self._channels:
            channel.begin()
            if isinstance(channel, Channel) and not self._trains:
                channel.forget()  # an evaluation does not depend on those before

    def listen(self, listener: Listener) -> None:
        """Receives a step's messages from other processes; ``listener`` is told of each."""
        for receiver in self._receivers:
            receiver.listen(listener)

    def awaited(self) -> list[str]:
        """What has not arrived from other processes, for error messages."""
        return [text for receiver in self._receivers if (text := receiver.waiting())]

    def give_up(self) -> None:
        """After a failure: makes no process wait for what is never sent."""
        for sender in self._senders:
            sender.give_up()
        for receiver in self._receivers:
            receiver.give_up()

    def flush(self, timeout: float) -> None:
        """Returns when other processes have everything that was sent to them, or after ``timeout`` seconds."""
        for sender in self._senders:
            sender.flush(timeout)

    def close(self, timeout: float) -> None:
        """Flushes, and ends threads."""
        self.flush(timeout)
        for receiver in self._receivers:
            receiver.close(timeout)

    def end(self) -> None:
        """Frees what a failed step has left."""
        self._skips.end()
        for channel in self._channels:
            channel.end()
        self._step = None

    def messages(self) -> list[Messages]:
        """What this process has sent between ranks in the step."""
        sent = [
            (b, name, direction.sending.get(b), None)
            for name, direction in (("forward", self._forward), ("backward", self._backward))
            for b in self._boundaries_between_ranks
        ]
        of_skips = [
            of_skip
            for name, skip in self._skips_between_ranks
            for of_skip in (
                (skip.source, "forward", self._skips.forward.sending.get(name), name),
                (skip.target - 1, "backward", self._skips.backward.sending.get(name), name),
            )
        ]
        return [
            Messages(b, direction, c.sent, c.packed_nbytes, c.result_nbytes, c.seconds, skip)
            for b, direction, c, skip in (*sent, *of_skips)
            if c is not None
        ]

    def send_value(self, stage: int, m: int, value: Any) -> None:
        """Sends ``stage``'s output for microbatch ``m`` to the next stage."""
        channel = self._forward.sending[stage]
        if channel.hands_over:
            channel.send(m, (value,))
            return
        leaves: Sequence[Any]
        leaves, spec = ([value], None) if type(value) is Tensor else flatten(value)
        count, dtensors = len(leaves), None
        if isinstance(channel, ToProcess):
            leaves, dtensors = to_local(leaves)
            leaves = [*leaves, *self.step.passed_on(stage, m)]
        channel.send(m, [*leaves, dtensors, count, spec])

    def transfer_value(self, stage: int, m: int) -> None:
        """Moves what ``stage`` has sent to the next stage's device or process, if that is another."""
        self._forward.on_streams[stage].transfer(m)

    def transfer_gradients(self, stage: int, m: int) -> None:
        """Moves the gradients that ``stage`` has sent back to the previous stage's device or process."""
        self._backward.on_streams[stage - 1].transfer(m)

    def receive_value(self, stage: int, m: int, meshes: Meshes) -> Any:
        """What the previous stage has sent to ``stage``, whose DTensors lie on ``meshes``."""
        channel = self._forward.receiving[stage - 1]
        if channel.hands_over:
            (value,) = channel.receive(m)
            return value
        *leaves, dtensors, count, spec = channel.receive(m)
        if isinstance(channel, FromProcess):
            self.step.take_in(stage, m, leaves[count:])
            leaves = [*from_local(leaves[:count], dtensors, meshes)]
        return leaves[0] if spec is None else unflatten(leaves[:count], spec)

    def send_gradients(self, stage: int, m: int, gradients: Sequence[Tensor | None]) -> None:
        """Sends the gradients of ``stage``'s inputs back to the previous stage."""
        channel = self._backward.sending[stage - 1]
        if not isinstance(channel, ToProcess):
            channel.send(m, gradients)
            return
        # By the last message the last stage has run all forwards: the loss is known.
        loss = self.step.known_loss() if channel.completes(m) else None
        leaves, dtensors = to_local(gradients)
        channel.send(m, [*leaves, dtensors, loss])

    def receive_gradients(self, stage: int, m: int, meshes: Meshes) -> Sequence[Tensor | None]:
        """The gradients of what ``stage`` has sent, DTensors on ``meshes``; none for the last stage."""
        if stage == self.num_stages - 1:
            return ()
        channel = self._backward.receiving[stage]
        gradients = channel.receive(m)
        if isinstance(channel, FromProcess):
            *gradients, dtensors, loss = gradients
            if loss is not None:
                self.step.learn_loss(loss)
            return from_local(gradients, dtensors, meshes)
        return gradients

    def send_skip(self, stage: int, name: str, m: int, tensor: Tensor) -> None:
        """Sends what ``stage`` has stashed for microbatch ``m`` to the stage that pops it."""
        self._skips.send(name, m, tensor)

    def receive_skip(self, stage: int, name: str, m: int) -> Tensor:
        """What an earlier stage has stashed for ``stage``.

        Raises PipelineError if a stage in between changed it in place.
        """
        return self._skips.receive(name, m)

    def send_skip_gradient(self, stage: int, name: str, m: int, gradient: Tensor | None) -> None:
        """Sends the gradient of what ``stage`` has popped back."""
        self._skips.send_gradient(name, m, gradient)

    def receive_skip_gradient(self, stage: int, name: str, m: int) -> Tensor | None:
        """The gradient of what ``stage`` has stashed."""
        return self._skips.receive_gradient(name, m)

    def release(self, stage: int, m: int) -> None:
        """Frees what ``stage`` received for microbatch ``m``."""
        for channel in self._releasing[stage]:
            channel.release(m)
