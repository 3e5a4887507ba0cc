"""The channels of one direction: forward for activations, backward for gradients."""

from collections.abc import Mapping
from typing import Generic, TypeVar

from .channel import Channel
from .remote_receiver import RemoteReceiver
from .remote_sender import RemoteSender
from .stream_remote import StreamReceiver, StreamSender

ToProcess = RemoteSender | StreamSender
FromProcess = RemoteReceiver | StreamReceiver
OnStreams = Channel | StreamSender | StreamReceiver
AnyChannel = Channel | ToProcess | FromProcess

Key = TypeVar("Key", int, str)


class Direction(Generic[Key]):
    """The channels of one direction that begin or end in this process, by boundary or by name of a skip.

    Attributes:
        sending: those that a stage of this process sends into.
        receiving: those that a stage of this process receives from.
        on_streams: those whose messages a task enqueues on a device stream.
    """

    def __init__(self, channels: Mapping[Key, AnyChannel | None]) -> None:
        """None: between two stages of other processes."""
        self.channels = [c for c in channels.values() if c is not None]
        self.sending: dict[Key, Channel | ToProcess] = {
            key: c for key, c in channels.items() if isinstance(c, Channel | ToProcess)
        }
        self.receiving: dict[Key, Channel | FromProcess] = {
            key: c for key, c in channels.items() if isinstance(c, Channel | FromProcess)
        }
        self.on_streams: dict[Key, OnStreams] = {
            key: c for key, c in channels.items() if isinstance(c, OnStreams)
        }
