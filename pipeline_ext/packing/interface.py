"""What fills a buffer and empties it: on the CPU the native core, on a CUDA device one kernel launch."""

from collections.abc import Sequence
from typing import Protocol

from .. import _C
from ..errors import PipelineError
from .arrays import Array, as_tensors
from .layout import Layout


class Packer(Protocol):
    """Moves the tensors it is bound to into a buffer of its layout, and back; ``packer`` makes one.

    The arithmetic is float32, and float64 for a float64 tensor. Casts are torch's: to nearest even, and what is
    too large becomes infinity, or in float8_e4m3fn, which has none, the largest number. Integers and booleans
    are copied as they are, whatever the scale. Autograd sees none of it.
    """

    def rebind(self, tensors: Sequence[Array]) -> None:
        """Moves other tensors from now on, one for each slot, of its shape and type, strided in any way.

        They are kept alive. One that is given other memory, as by ``resize_`` or ``.data =``, is to be bound
        again. Raises InvalidArgument, and changes nothing, for tensors that do not fit.
        """

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

        Bytes between slots are left as they are.

        Args:
            buffer: contiguous uint8 of at least ``layout.nbytes``, at an address that 16 divides.
            scale: of every tensor.
            scales: float32, one for each slot; a tensor's scale is ``scale`` times its own.
            amax: float32, one for each slot. A floating-point tensor raises its entry to its largest magnitude
                before scaling, NaN being the largest of all; clear it before.
            nonfinite: one int32, set to 1 if there is an infinity or NaN in a tensor; never cleared.

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

        Arguments are those of ``pack``: to undo its scales, give their inverses. With ``accumulate`` that is
        added to the tensor; the sum is rounded once.

        Raises InvalidArgument as ``pack`` does, for a tensor whose elements share memory, and for integers or
        booleans with ``accumulate``.
        """


def packer(layout: Layout, tensors: Sequence[Array]) -> Packer:
    """A packer bound to these tensors: the native one, or for tensors on a CUDA device the Triton kernels'.

    Make it once for a layout and a device, and rebind it. For no tensors it is the native one.
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
