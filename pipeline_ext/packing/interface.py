"""Packers: the native core on the CPU, one kernel launch on a CUDA device."""

from collections.abc import Sequence
from typing import Protocol

from .. import _C
from ..errors import PipelineError
from .arrays import Array, as_tensors
from .layout import Layout


class Packer(Protocol):
    """Copies the tensors it is bound to into a buffer of its layout, and back; ``packer`` makes one.

    It computes in float32, or in float64 for a float64 tensor. Casts are torch's: they round to nearest even,
    and a number that is too large becomes infinity, or the largest number in float8_e4m3fn, which has no
    infinity. Integers and booleans are copied unchanged, whatever the scale. Autograd does not record it.
    """

    def rebind(self, tensors: Sequence[Array]) -> None:
        """Binds other tensors: one for each slot, of its shape and type, with any strides.

        The packer keeps them alive. Bind a tensor again after its memory changed (``resize_``, ``.data =``).
        Raises InvalidArgument, and changes nothing, for tensors that do not fit.
        """

    def release(self) -> None:
        """Drops the tensors; bind others before the next call."""

    def pack(
        self,
        buffer: Array,
        scale: float = 1.0,
        *,
        scales: Array | None = None,
        amax: Array | None = None,
        nonfinite: Array | None = None,
    ) -> None:
        """Writes every tensor times its scale into its slot, cast to the wire type.

        Bytes between slots are not written.

        Args:
            buffer: contiguous uint8 of at least ``layout.nbytes``, at an address that is a multiple of 16.
            scale: for every tensor.
            scales: float32, one for each slot; a tensor's scale is ``scale`` times its own.
            amax: float32, one for each slot. Raised to the largest magnitude of a floating-point tensor before
                scaling; NaN counts as the largest. Clear it before.
            nonfinite: one int32, set to 1 if a tensor holds an infinity or NaN; never cleared.

        Raises InvalidArgument, having written nothing, for arguments of another type, length or device.
        """

    def unpack(
        self,
        buffer: Array,
        scale: float = 1.0,
        *,
        scales: Array | None = None,
        accumulate: bool = False,
    ) -> None:
        """Writes every slot times its scale into its tensor, cast back.

        Takes the arguments of ``pack``; to undo its scales give their inverses. With ``accumulate`` the result
        is added to the tensor, and the sum is rounded once.

        Raises InvalidArgument as ``pack`` does, also for a tensor whose elements share memory, and for integers
        or booleans with ``accumulate``.
        """


def packer(layout: Layout, tensors: Sequence[Array]) -> Packer:
    """A packer bound to these tensors: a native one, or a Triton one for tensors on a CUDA device.

    Make it once for a layout and a device, then rebind it. Without tensors it is a native one.

    Raises InvalidArgument for tensors that do not fit the layout, PipelineError on CUDA without triton.
    """
    on_cuda = any(tensor.is_cuda for tensor in as_tensors(tensors[:1]))
    if not on_cuda:
        return _C.NativePacker(layout, tensors)
    try:
        from .fused import FusedPacker
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise PipelineError(
            'packing on a GPU needs triton, which is not installed: pip install "pipeline_ext[gpu]"'
        ) from error
    return FusedPacker(layout, tensors)
