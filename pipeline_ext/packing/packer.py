"""The tensors of a layout, ready to be packed and unpacked by one kernel launch."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..boundary import describe
from ..errors import InvalidArgument, PipelineError
from .layout import FLOATING, Layout
from .tables import chunk_table, collapse, kinds, slot_table


class Packer:
    """Moves tensors into a buffer and back, on one CUDA device.

    Tables on the device say where the tensors lie, so that a launch allocates nothing, copies nothing from the
    host and waits for nothing. It goes to the current stream, and may be captured in a CUDA graph once the same
    call was made with ``launch=False``: compiling a kernel is not to be captured. Autograd sees none of it.
    """

    def __init__(self, layout: Layout, tensors: Sequence[Tensor]) -> None:
        """
        Args:
            layout: of the buffer.
            tensors: one for each slot, of its shape and type, strided in any way, on one device; kept alive.

        Raises InvalidArgument for tensors that do not fit, PipelineError without triton.
        """
        kernels = _import_kernels()
        layout.check_tensors(tensors)
        self._layout = layout
        self._device = tensors[0].device if tensors else torch.device("cpu")
        if tensors and self._device.type != "cuda" and not kernels.INTERPRETED:
            raise InvalidArgument(f"the tensors are on {self._device}; give tensors on a CUDA device")
        self._pack, self._unpack = kernels.pack, kernels.unpack
        rank = max((len(collapse(tensor)) for tensor in tensors), default=0)
        largest = max((slot.count for slot in layout.slots), default=0)
        self._constants = kernels.constants(kinds(layout), max(rank, 1), largest)
        self._integer = next((i for i, s in enumerate(layout.slots) if s.dtype not in FLOATING), None)
        self._chunks = self._upload(chunk_table(layout))
        self._slots: Tensor | None = None
        self.rebind(tensors)

    def rebind(self, tensors: Sequence[Tensor]) -> None:
        """Takes other tensors of the same shapes and types, by one copy to the device on the current stream.

        A graph that captured launches of this packer moves these tensors from then on. Not to be captured.
        Raises InvalidArgument, and changes nothing, for tensors that do not fit, or that need more dimensions
        to step through than the first ones did.
        """
        self._layout.check_tensors(tensors)
        rank = self._constants["RANK"]
        expanded = None
        for i, tensor in enumerate(tensors):
            if tensor.device != self._device:
                raise InvalidArgument(f"tensor {i} is on {tensor.device}; the packer is on {self._device}")
            dimensions = collapse(tensor)
            if len(dimensions) > rank:
                raise InvalidArgument(
                    f"tensor {i} has strides {tensor.stride()}, {len(dimensions)} dimensions to step through;"
                    f" this packer was made for {rank}, make another"
                )
            if expanded is None and tensor.numel() and any(stride == 0 for _, stride in dimensions):
                expanded = i
        self._slots = self._upload(slot_table(self._layout, tensors, rank), self._slots)
        self._tensors = list(tensors)
        self._expanded = expanded

    def pack(
        self,
        buffer: Tensor,
        scale: float = 1.0,
        *,
        scales: Tensor | None = None,
        amax: Tensor | None = None,
        nonfinite: Tensor | None = None,
        launch: bool = True,
    ) -> None:
        """Writes every tensor times its scale into its slot, cast to the wire type, in one launch.

        The arithmetic is float32, and float64 for a float64 tensor. Casts are torch's: to nearest even, and
        what is too large becomes infinity, or in float8_e4m3fn, which has none, the largest number. Integers
        and booleans are copied. Bytes between slots are left as they are.

        Args:
            buffer: contiguous uint8 of at least ``layout.nbytes``, at an address that 16 divides.
            scale: of every tensor.
            scales: float32, one for each slot; a tensor's scale is ``scale`` times its own.
            amax: float32, one for each slot. A floating-point tensor raises its entry to its largest magnitude
                before scaling, NaN being the largest of all; clear it before.
            nonfinite: one int32, set to 1 if there is an infinity or NaN in a tensor; never cleared.
            launch: False: only compiles and loads the kernel.

        Raises InvalidArgument for arguments of another type, length or device.
        """
        self._check("amax", amax, torch.float32, len(self._layout.slots))
        self._check("nonfinite", nonfinite, torch.int32, 1)
        self._launch(self._pack, launch, buffer, scale, scales, amax, nonfinite)

    def unpack(
        self,
        buffer: Tensor,
        scale: float = 1.0,
        *,
        scales: Tensor | None = None,
        accumulate: bool = False,
        launch: bool = True,
    ) -> None:
        """Writes every slot times its scale into its tensor, cast back, in one launch.

        Arguments and arithmetic are those of ``pack``: to undo its scales, give their inverses. With
        ``accumulate`` that is added to the tensor; the sum is rounded once.

        Raises InvalidArgument as ``pack`` does, for a tensor whose elements share memory, and for integers or
        booleans with ``accumulate``.
        """
        if self._expanded is not None:
            raise InvalidArgument(
                f"tensor {self._expanded} is expanded, so that elements share memory; unpack into a clone"
            )
        if accumulate and self._integer is not None:
            found = describe(self._tensors[self._integer])
            raise InvalidArgument(f"tensor {self._integer} is {found}; only floating-point types accumulate")
        self._launch(self._unpack, launch, buffer, scale, scales, ACCUMULATE=accumulate)

    def _launch(
        self,
        kernel: Any,
        launch: bool,
        buffer: Tensor,
        scale: float,
        scales: Tensor | None,
        *outputs: Tensor | None,
        **options: bool,
    ) -> None:
        self._layout.check_buffer(buffer)
        self._check("buffer", buffer, torch.uint8, len(buffer))
        self._check("scales", scales, torch.float32, len(self._layout.slots))
        programs = len(self._chunks)
        if not programs:
            return
        scaled = scale != 1 or scales is not None
        with torch.cuda.device_of(buffer):
            kernel[(programs if launch else 0,)](
                self._chunks,
                self._slots,
                buffer,
                float(scale),
                scales,
                *outputs,
                SCALED=scaled,
                **self._constants,
                **options,
            )

    def _check(self, name: str, tensor: Tensor | None, dtype: torch.dtype, count: int) -> None:
        if tensor is None:
            return
        if tensor.dtype != dtype or tensor.numel() != count or not tensor.is_contiguous():
            text = str(dtype).removeprefix("torch.")
            raise InvalidArgument(f"{name} is {describe(tensor)}; give contiguous {text}[{count}]")
        if tensor.device != self._device:
            raise InvalidArgument(f"{name} is on {tensor.device}; the packer is on {self._device}")

    def _upload(self, table: Tensor, to: Tensor | None = None) -> Tensor:
        if to is None:
            to = torch.empty_like(table, device=self._device)
        pinned = table.pin_memory() if to.is_cuda else table
        return to.copy_(pinned, non_blocking=True)


def _import_kernels() -> ModuleType:
    try:
        from . import kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise PipelineError(
            'a Packer needs triton, which is not installed: pip install "pipeline_ext[gpu]"'
        ) from error
    return kernels
