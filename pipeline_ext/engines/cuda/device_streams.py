"""Streams of random numbers for stages on GPUs. Not yet run on GPUs.

A kernel gets the state of the GPU's generator, two numbers, when the host enqueues it. One thread enqueues all
tasks of a step, one after another. So each task begins with a state of its own, whatever runs beside it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...stages.random_streams import AnyOfAll, NoStreams, RandomStreams, StepStreams
from . import torch_side


class DeviceStreams(RandomStreams):
    """As ``RandomStreams``, for stages on GPUs.

    A graph draws from the GPU's own generator, which moves on in each replay.
    """

    def __init__(self, devices: Sequence[torch.device], any_of_all: AnyOfAll | None, replica: int) -> None:
        """``devices``: each stage's. Each process derives the seeds from its own generator for the CPU."""
        super().__init__(any_of_all, replica)
        self._devices = devices

    def _streams(self, state: Tensor) -> StepStreams:
        if torch_side.is_capturing({device.index for device in self._devices}):
            return NoStreams()
        return _OnDevices(state, self._replica, [torch_side.generator(device) for device in self._devices])


class _OnDevices(StepStreams):
    def __init__(self, state: Tensor, replica: int, generators: Sequence[torch.Generator]) -> None:
        super().__init__(state, replica)
        self._generators = generators
        self._last: tuple[int, torch.Generator] | None = None
        self._before: dict[int, tuple[torch.Generator, Tensor]] = {}  # and their states

    def enter(self, stage: int, m: int, backward: bool = False) -> None:
        super().enter(stage, m, backward)
        self._look()
        generator = self._generators[stage]
        generator.manual_seed(self.seed(stage, 2 * m + backward))
        self._last = stage, generator

    def on_device(self, stage: int) -> torch.Generator | None:
        return self._generators[stage]

    def start(self) -> None:
        self._before = {id(generator): (generator, generator.get_state()) for generator in self._generators}

    def leave(self) -> None:
        super().leave()
        self._look()
        self._last = None
        for generator, state in self._before.values():
            generator.set_state(state)
        self._before = {}

    def _look(self) -> None:
        """Notes whether the last task drew."""
        if self._last is not None and self._last[1].get_offset() != 0:
            self.drew.add(self._last[0])
