"""All channels between the stages of a plan."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _C
from ..plan.records import Messages
from .channel import Channel, Passage
from .dtensors import Meshes, joined, parted
from .link import FREE_LINK, LocalLink
from .remote import Incoming, Outgoing, Receiver
from .skip_channel import SkipChannel
from .stream_ends import StreamIncoming, StreamOutgoing

ToProcess = Outgoing | StreamOutgoing
FromProcess = Incoming | StreamIncoming
AnyChannel = Channel | ToProcess | FromProcess | None
EndOf = Callable[[int, int, int, torch.dtype | None, str | None], ToProcess | FromProcess | None]


class StepData(Protocol):
    """What an exchange needs to know of the step that runs: what travels along with its values."""

    def passed_on(self, stage: int, m: int) -> list[Any]: ...

    def take_in(self, stage: int, m: int, known: list[Any]) -> None: ...

    def known_loss(self) -> Tensor | None: ...

    def learn_loss(self, loss: Tensor) -> None: ...


class Exchange:
    """What the stages of a plan give one another: activations forward, gradients backward.

    Neighbours do, and both ends of a skip. Between stages of one rank nothing is packed, and there are no
    messages. What goes to another process takes along what is known here of the step: how many rows there are,
    and what stages have added to the loss.
    """

    def __init__(
        self,
        plan: _C.Plan,
        wire: Sequence[torch.dtype | None] = (),
        wire_forward: Sequence[torch.dtype | None] = (),
        link: LocalLink = FREE_LINK,
        passage_of: Callable[[int, str], Passage] | None = None,
        skips: Sequence[str] = (),
        end_of: EndOf | None = None,
    ) -> None:
        """``wire`` and ``wire_forward``: types of gradients and activations by boundary; empty: their own.

        ``passage_of``: of ranks on streams of devices, what looks after the memory of activations ("F") or
        gradients ("B") that cross a boundary.

        ``skips``: names of the plan's skips. One travels as the type that its sender sends across its boundary.

        ``end_of``: of ranks that are processes, this one's end of a way between two of them, if it has one.
        """
        self.num_stages = plan.num_stages
        self._trains = plan.has_backward
        ranks = plan.rank_of_stage
        self._crossing = [a != b for a, b in zip(ranks, ranks[1:])]

        def skip_channel(
            skip: _C.Skip,
            sender: int,
            receiver: int,
            pack: int,
            wires: Sequence[torch.dtype | None],
            name: str,
        ) -> AnyChannel:
            if ranks[sender] == ranks[receiver]:
                return Channel(plan.num_microbatches)
            wire = wires[sender if sender < receiver else sender - 1] if wires else None
            if end_of is not None:
                return end_of(sender, receiver, pack, wire, name)
            return Channel(plan.num_microbatches, pack, wire, plan.limits[skip.source], link)

        def channel(boundary: int, way: str, pack: int, wires: Sequence[torch.dtype | None]) -> AnyChannel:
            passage = None if passage_of is None else passage_of(boundary, way)
            if not self._crossing[boundary]:
                return Channel(plan.num_microbatches, passage=passage)
            wire = wires[boundary] if wires else None
            if end_of is not None:
                between = (boundary, boundary + 1) if way == "F" else (boundary + 1, boundary)
                return end_of(*between, pack, wire, None)
            # Activations are in use as long as the receiver's microbatch is in flight, gradients as long as
            # theirs is; both are the stage's that holds more.
            in_flight = plan.limits[boundary]
            return Channel(plan.num_microbatches, pack, wire, in_flight, link, passage)

        self._forward = [channel(b, "F", k, wire_forward) for b, k in enumerate(plan.packs_forward)]
        self._backward = [channel(b, "B", k, wire) for b, k in enumerate(plan.packs)]
        self._skips: dict[str, SkipChannel] = {}
        self._crossing_skips: list[tuple[str, _C.Skip]] = []
        to_stage = [
            [*self._forward[max(s - 1, 0) : s], *self._backward[s : s + 1]] for s in range(plan.num_stages)
        ]
        for name, skip in zip(skips, plan.skips, strict=True):
            forward = skip_channel(skip, skip.source, skip.target, skip.pack_forward, wire_forward, name)
            backward = skip_channel(skip, skip.target, skip.source, skip.pack, wire, name)
            self._skips[name] = SkipChannel(name, forward, backward)
            to_stage[skip.target].append(forward)
            to_stage[skip.source].append(backward)
            if ranks[skip.source] != ranks[skip.target]:
                self._crossing_skips.append((name, skip))
        of_skips = [c for skip in self._skips.values() for c in (skip.forward, skip.backward)]
        self._neighbours = [c for c in (*self._forward, *self._backward) if c is not None]
        self._remote = [c for c in (*self._neighbours, *of_skips) if isinstance(c, Outgoing | Incoming)]
        self._releasing = [  # by stage: the channels to it whose results lie in buffers
            [c for c in channels if c is not None and not c.hands_over and not isinstance(c, ToProcess)]
            for channels in to_stage
        ]
        self._step: StepData | None = None

    @property
    def step(self) -> StepData:
        """The step that runs."""
        return self._step

    @property
    def packs(self) -> bool:
        """Whether any results are packed, neither handed over nor copied."""
        return not all(c.hands_over or getattr(c, "is_plain", False) for c in self._neighbours)

    def begin(self, step: StepData) -> None:
        """Prepares for a step."""
        self._step = step
        for channel in (*self._neighbours, *self._skips.values()):
            if isinstance(channel, Incoming):
                continue  # it begins with ``listen``
            channel.begin()
            if not self._trains and isinstance(channel, Channel | SkipChannel):
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
        for channel in (*self._neighbours, *self._skips.values()):
            channel.end()
        self._step = None

    def messages(self) -> list[Messages]:
        """What the step has sent between ranks."""
        crossing = [
            (way, b, c, None)
            for way, channels in (("forward", self._forward), ("backward", self._backward))
            for b, c in enumerate(channels)
            if self._crossing[b]
        ]
        for name, skip in self._crossing_skips:
            crossing.append(("forward", skip.source, self._skips[name].forward, name))
            crossing.append(("backward", skip.target - 1, self._skips[name].backward, name))
        return [
            Messages(b, way, c.sent, c.packed_nbytes, c.result_nbytes, c.seconds, skip)
            for way, b, c, skip in crossing
            if c is not None and not isinstance(c, FromProcess)
        ]

    def send_value(self, stage: int, m: int, value: Any) -> None:
        """Sends what ``stage`` has made of microbatch ``m`` on to the next stage."""
        channel = self._forward[stage]
        if channel.hands_over:
            channel.send(m, (value,))
        else:
            leaves, spec = ([value], None) if type(value) is Tensor else pytree.tree_flatten(value)
            known, dtensors = (), None
            if isinstance(channel, ToProcess):
                known = self._step.passed_on(stage, m)
                leaves, dtensors = parted(leaves)
            channel.send(m, [*leaves, *known, dtensors, len(leaves), spec])

    def carry_value(self, stage: int, m: int) -> None:
        """Takes what ``stage`` has sent on to the next stage's device or process, if that is another."""
        self._forward[stage].carry(m)

    def carry_gradients(self, stage: int, m: int) -> None:
        """Takes the gradients that ``stage`` has sent back to the device or process of the stage before."""
        self._backward[stage - 1].carry(m)

    def receive_value(self, stage: int, m: int, meshes: Meshes) -> Any:
        """What the stage before has sent to ``stage``, whose DTensors lie on ``meshes``."""
        channel = self._forward[stage - 1]
        if channel.hands_over:
            (value,) = channel.receive(m)
            return value
        *leaves, dtensors, count, spec = channel.receive(m)
        if isinstance(channel, FromProcess):
            self._step.take_in(stage, m, leaves[count:])
            leaves = joined(leaves[:count], dtensors, meshes)
        return leaves[0] if spec is None else pytree.tree_unflatten(leaves[:count], spec)

    def send_gradients(self, stage: int, m: int, gradients: list[Tensor | None]) -> None:
        """Sends the gradients of what ``stage`` was sent back to the stage before."""
        channel = self._backward[stage - 1]
        if isinstance(channel, ToProcess):
            # By the last message the last stage has run all forwards: the loss is known.
            loss = self._step.known_loss() if channel.completes(m) else None
            gradients, dtensors = parted(gradients)
            gradients = [*gradients, dtensors, loss]
        channel.send(m, gradients)

    def receive_gradients(self, stage: int, m: int, meshes: Meshes) -> Sequence[Tensor | None]:
        """The gradients of what ``stage`` has sent, DTensors on ``meshes``; of the last stage none."""
        if stage == len(self._backward):
            return ()
        channel = self._backward[stage]
        gradients = channel.receive(m)
        if isinstance(channel, FromProcess):
            *gradients, dtensors, loss = gradients
            if loss is not None:
                self._step.learn_loss(loss)
            return joined(gradients, dtensors, meshes)
        return gradients

    def send_skip(self, stage: int, name: str, m: int, tensor: Tensor) -> None:
        """Sends what ``stage`` has stashed of microbatch ``m`` to the stage that pops it."""
        self._skips[name].send(m, tensor)

    def receive_skip(self, stage: int, name: str, m: int) -> Tensor:
        """What an earlier stage has stashed for ``stage``.

        Raises PipelineError where a stage between has changed it in place.
        """
        return self._skips[name].receive(m)

    def send_skip_gradient(self, stage: int, name: str, m: int, gradient: Tensor | None) -> None:
        """Sends the gradient of what ``stage`` has popped back."""
        self._skips[name].backward.send(m, (gradient,))

    def receive_skip_gradient(self, stage: int, name: str, m: int) -> Tensor | None:
        """The gradient of what ``stage`` has stashed."""
        (gradient,) = self._skips[name].backward.receive(m)
        return gradient

    def release(self, stage: int, m: int) -> None:
        """``stage`` needs no more what other stages have sent it of microbatch ``m``."""
        for channel in self._releasing[stage]:
            channel.release(m)
