"""The Triton packer: packs the tensors of a CUDA device with one kernel launch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..base.tensors import FLOATING, describe
from ..errors import InvalidArgument, PipelineError
from . import kernels
from .arrays import Array, as_tensor, as_tensors
from .layout import Layout
from .tables import chunk_table, kinds, room, slot_table


class FusedPacker:
    """The ``Packer`` of tensors on one CUDA device.

    Tables on the device hold the tensors' addresses. So a launch allocates nothing, copies nothing from the
    host and waits for nothing. It goes to the current stream. A CUDA graph can capture it after the same call
    with ``launch=False``, which only compiles and loads the kernel and must not be captured. The graph does not
    keep the tables: keep the packer as long as the graph.
    """

    def __init__(self, layout: Layout, tensors: Sequence[Array]) -> None:
        given = as_tensors(tensors)
        self._layout = layout
        self._device = given[0].device if given else torch.device("cpu")
        largest = max((slot.count for slot in layout.slots), default=0)
        self._constants = kernels.constants(kinds(layout), room(layout), largest)
        self._integer = next((i for i, s in enumerate(layout.slots) if s.dtype not in FLOATING), None)
        self._chunks = self._upload(chunk_table(layout))
        self._slots: Tensor | None = None
        self._tensors: list[Tensor] | None = None
        self.rebind(given)

    def rebind(self, tensors: Sequence[Array]) -> None:
        """Binds other tensors, by one copy to the device on the current stream.

        A graph that captured launches of this packer uses these tensors from then on. A graph can capture the
        binding too, which then happens in each replay: the addresses are arguments of its kernels.
        """
        given = as_tensors(tensors)
        self._layout.check_tensors(given)
        for i, tensor in enumerate(given):
            if tensor.device != self._device:
                raise InvalidArgument(f"tensor {i} is on {tensor.device}; the packer is on {self._device}")
        table = slot_table(self._layout, given)
        if self._slots is None or not _is_captured(self._device):
            self._slots = self._upload(table, self._slots)
        elif given:
            # The host may have freed a table by the time of a replay; numbers are copied into the graph.
            torch._foreach_add_(list(self._slots.zero_().flatten().unbind()), table.flatten().tolist())
        self._tensors = given
        self._expanded = next((i for i, tensor in enumerate(given) if _is_expanded(tensor)), None)

    def release(self) -> None:
        self._tensors = None

    def pack(
        self,
        buffer: Array,
        scale: float = 1.0,
        *,
        scales: Array | None = None,
        amax: Array | None = None,
        nonfinite: Array | None = None,
        launch: bool = True,
    ) -> None:
        slots = len(self._layout.slots)
        outputs = (
            self._row("amax", amax, torch.float32, slots),
            self._row("nonfinite", nonfinite, torch.int32, 1),
        )
        self._launch(kernels.pack, launch, buffer, scale, scales, *outputs)

    def unpack(
        self,
        buffer: Array,
        scale: float = 1.0,
        *,
        scales: Array | None = None,
        accumulate: bool = False,
        launch: bool = True,
    ) -> None:
        if accumulate and self._integer is not None:
            found = self._layout.slots[self._integer].describe()
            raise InvalidArgument(f"tensor {self._integer} is {found}; only floating-point types accumulate")
        if self._expanded is not None:
            raise InvalidArgument(
                f"tensor {self._expanded} is expanded, so that elements share memory; unpack into a clone"
            )
        self._launch(kernels.unpack, launch, buffer, scale, scales, ACCUMULATE=accumulate)

    def _launch(
        self,
        kernel: Any,
        launch: bool,
        buffer: Array,
        scale: float,
        scales: Array | None,
        *outputs: Tensor | None,
        **options: bool,
    ) -> None:
        whole = self._on_device("the buffer", self._layout.check_buffer(buffer))
        factors = self._row("scales", scales, torch.float32, len(self._layout.slots))
        if self._tensors is None:
            raise InvalidArgument("no tensors are bound; call rebind first")
        programs = len(self._chunks)
        if not programs:
            return
        with torch.cuda.device_of(whole):
            kernel[(programs if launch else 0,)](
                self._chunks,
                self._slots,
                whole,
                float(scale),
                factors,
                *outputs,
                SCALED=scale != 1 or factors is not None,
                **self._constants,
                **options,
            )

    def _row(self, name: str, value: Array | None, dtype: torch.dtype, count: int) -> Tensor | None:
        """An optional argument as a tensor of ``count`` elements."""
        if value is None:
            return None
        tensor = as_tensor(value, name)
        if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
            text = str(dtype).removeprefix("torch.")
            raise InvalidArgument(f"{name} is {describe(tensor)}; give contiguous {text}[{count}]")
        return self._on_device(name, tensor)

    def _on_device(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.device != self._device:
            raise InvalidArgument(f"{name} is on {tensor.device}; the packer is on {self._device}")
        return tensor

    def _upload(self, table: Tensor, to: Tensor | None = None) -> Tensor:
        if _is_captured(self._device):
            raise PipelineError(
                "a packer was made while a CUDA graph was captured, which would not keep its tables; make it "
                "before, and bind tensors once"
            )
        if to is None:
            to = torch.empty_like(table, device=self._device)
        pinned = table.pin_memory() if to.is_cuda else table
        return to.copy_(pinned, non_blocking=True)


def _is_captured(device: torch.device) -> bool:
    """Whether a graph captures what is enqueued on the device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _is_expanded(tensor: Tensor) -> bool:
    dimensions = zip(tensor.shape, tensor.stride())
    return tensor.numel() > 0 and any(size > 1 and stride == 0 for size, stride in dimensions)
