"""Messages whose floating-point tensors are sent as another type."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..base.memory import Look, Region, share_memory
from ..base.tensors import REPLACEABLE
from ..errors import PipelineError
from ..packing import Layout, Packer, aligned, packer
from .format import Format

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}  # finite numbers


class Cast(Format):
    """Sends floating-point tensors as the wire type. The receiver casts them back, after the message.

    For float8 each tensor is scaled by a power of two, which is sent along. It follows from the tensor's
    largest magnitude in the step before: delayed scaling, as in Micikevicius et al., FP8 Formats for Deep
    Learning, 2022. If that scale does not fit the values of this step, they are packed again.
    """

    def __init__(self, tensors: Sequence[Tensor], looks: list[Look], wire: torch.dtype) -> None:
        """Raises PipelineError for tensors that share memory."""
        super().__init__(looks)
        first: dict[Look, int] = {}
        self._same_as = [first.setdefault(look, i) for i, look in enumerate(looks)]
        self._distinct = list(first.values())
        if share_memory([tensors[i].detach() for i in self._distinct]):
            raise PipelineError(
                "tensors that share memory cannot travel as another type, which would part them; hand over "
                "one of them, or a clone, or give no wire type"
            )
        sent = self._sent(tensors)
        self._wire = wire
        self._largest: Tensor | None = None  # magnitude in each slot, in the message before
        if wire in _LARGEST:
            sent.append(_bits(torch.ones(len(sent) + 1, device=sent[0].device)))
        self._layout = Layout.of(sent, wire)
        self._opened = Layout.of(sent)
        self._packer = packer(self._layout, sent)
        self._unpackers: dict[torch.device, Packer] = {}  # by the device of the message
        self._opened_at = aligned(self._layout.nbytes)
        self.sent_nbytes = self._layout.nbytes
        self.nbytes = self._opened_at + self._opened.nbytes

    def pack(self, tensors: Sequence[Tensor], regions: Sequence[Region], buffer: Tensor) -> None:
        sent = self._sent(tensors)
        if self._wire in _LARGEST:
            self._pack_scaled(sent, buffer)
        else:
            self._packer.rebind(sent)
            self._packer.pack(buffer)
        self._packer.release()

    def open(self, buffer: Tensor) -> list[Tensor]:
        opened = self._opened.views(buffer[self._opened_at :])
        unpacker = self._unpackers.get(buffer.device)
        if unpacker is None:
            unpacker = self._unpackers[buffer.device] = packer(self._layout, opened)
        else:
            unpacker.rebind(opened)
        if self._wire in _LARGEST:
            unpacker.unpack(buffer, scales=1.0 / self._scales_in(buffer))
        else:
            unpacker.unpack(buffer)
        unpacker.release()
        distinct = dict(zip(self._distinct, opened))
        return [
            (torch.view_as_complex(distinct[i]) if look.dtype.is_complex else distinct[i]).data
            for i, look in zip(self._same_as, self.looks)
        ]

    def _sent(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_as_real(tensors[i].detach()) for i in self._distinct]

    def _pack_scaled(self, sent: list[Tensor], buffer: Tensor) -> None:
        if self._largest is None:
            self._largest = torch.zeros(len(sent) + 1, device=buffer.device)
        scales = _scales_for(self._largest, self._wire)
        # In place, because other streams may still read this tensor.
        self._largest.copy_(self._pack_with(scales, sent, buffer))
        fitting = _scales_for(self._largest, self._wire)
        misfit = _misfit(scales, self._largest, self._wire)
        if buffer.is_cuda:
            # To look would make the host wait for the device: packed again, with the same scales if they fit.
            self._pack_with(torch.where(misfit, fitting, scales), sent, buffer)
        elif misfit:
            self._pack_with(fitting, sent, buffer)
        if self._wire == torch.float8_e4m3fn:  # it has no infinity: a tensor that holds one arrives as NaN
            self._scales_in(buffer).masked_fill_(~self._largest.isfinite(), torch.nan)

    def _pack_with(self, scales: Tensor, sent: list[Tensor], buffer: Tensor) -> Tensor:
        """Packs with these scales; returns the largest magnitudes before scaling."""
        largest = torch.zeros_like(scales)
        self._packer.rebind([*sent, _bits(scales)])
        self._packer.pack(buffer, scales=scales, amax=largest)
        return largest

    def _scales_in(self, buffer: Tensor) -> Tensor:
        return self._layout.views(buffer)[-1].view(torch.float32)


def is_cast(dtype: torch.dtype, wire: torch.dtype | None) -> bool:
    """Whether a tensor of this type is sent as another."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return wire is not None and real in REPLACEABLE and real != wire


def _scales_for(largest: Tensor, wire: torch.dtype) -> Tensor:
    """Scales that bring the largest magnitudes into the upper half of the wire type's range.

    Half of it, because this step's magnitudes may be a little larger. 1 for a tensor of zeros, or one that is
    not finite.
    """
    exponents = torch.floor(torch.log2(_LARGEST[wire] / largest)) - 1
    return torch.exp2(torch.where(exponents.isfinite(), exponents, 0.0).clamp(-120, 120))


def _misfit(scales: Tensor, largest: Tensor, wire: torch.dtype) -> Tensor:
    """Whether a largest magnitude is too large for its scale, or so small that it loses precision."""
    scaled = largest * scales
    seen = largest.isfinite() & (largest > 0)
    return (seen & ((scaled > _LARGEST[wire]) | (scaled < _LARGEST[wire] / 64))).any()


def _bits(scales: Tensor) -> Tensor:
    """Scales as integers, which no wire type changes."""
    return scales.view(torch.int32)


def _as_real(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg()
