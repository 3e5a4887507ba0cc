"""What the results of several microbatches look like as one message."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..base.memory import REGION_ALIGNMENT, Look, Region, find_regions, share_memory
from ..errors import PipelineError
from ..packing import Layout, Packer, aligned, packer
from ..packing.layout import PACKABLE, REPLACEABLE

_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}  # finite numbers


class Format(ABC):
    """How tensors of given looks lie in a message.

    Attributes:
        looks: of the tensors.
        sent_nbytes: bytes that travel.
        nbytes: bytes of the buffer: those, and what the receiver needs behind them.
    """

    sent_nbytes: int
    nbytes: int

    def __init__(self, looks: list[Look]) -> None:
        self.looks = looks

    @abstractmethod
    def pack(self, tensors: Sequence[Tensor], regions: Sequence[Region], buffer: Tensor) -> None:
        """Writes the message. ``regions`` are where the tensors lie."""

    @abstractmethod
    def open(self, buffer: Tensor) -> list[Tensor]:
        """The tensors of a message, as views of its buffer; to be called once.

        Each has a version of its own: one that is changed in place does not spoil the others.
        """

    def template(self, requires_grad: Sequence[bool], parts: Sequence[Any]) -> _C.MessageTemplate | None:
        """What packs a message of this format in one call, where that can be."""
        return None


def message_of(
    tensors: Sequence[Tensor], wire: torch.dtype | None, known: Format | None
) -> tuple[Format, list[Region]]:
    """The format of a message with these tensors, ``known`` if that fits, and the regions they lie in.

    Raises PipelineError for tensors that cannot be packed.
    """
    looks, regions = find_regions(tensors)
    if known is not None and known.looks == looks:
        return known, regions
    if any(_is_cast(tensor.dtype, wire) for tensor in tensors):
        return Cast(tensors, looks, wire), regions
    return AsIs(looks, [region.end - region.begin for region in regions]), regions


class AsIs(Format):
    """The memory that the tensors lie in travels as it is: strides, overlaps and alignment stay."""

    def __init__(self, looks: list[Look], region_sizes: Sequence[int]) -> None:
        """``region_sizes``: bytes of each region."""
        super().__init__(looks)
        self.region_sizes = list(region_sizes)
        self._layout = Layout.of(
            torch.empty(size, dtype=torch.uint8, device="meta") for size in self.region_sizes
        )
        self._packer: Packer | None = None
        self.sent_nbytes = self.nbytes = self._layout.nbytes

    def pack(self, tensors: Sequence[Tensor], regions: Sequence[Region], buffer: Tensor) -> None:
        memory = [region.bytes() for region in regions]
        if self._packer is None:
            self._packer = packer(self._layout, memory)
        else:
            self._packer.rebind(memory)
        self._packer.pack(buffer)
        self._packer.release()

    def copy(self, regions: Sequence[Region], buffer: Tensor) -> None:
        """Writes the message by plain copies: for that nothing goes up from the host, which no graph allows."""
        slots = [buffer[slot.offset : slot.offset + slot.nbytes] for slot in self._layout.slots]
        if slots:
            torch._foreach_copy_(slots, [region.bytes() for region in regions])

    def open(self, buffer: Tensor) -> list[Tensor]:
        storage, begin = buffer.untyped_storage(), buffer.storage_offset()
        slots = self._layout.slots
        return [look.see(storage, begin + slots[look.region].offset) for look in self.looks]

    def template(self, requires_grad: Sequence[bool], parts: Sequence[Any]) -> _C.MessageTemplate | None:
        if len(self.region_sizes) < len(self.looks) or not all(map(_is_copied_whole, self.looks)):
            return None
        places = [
            (look.dtype, look.shape, self._layout.slots[look.region].offset + look.offset, look.offset)
            for look in self.looks
        ]
        return _C.MessageTemplate(places, requires_grad, parts, REGION_ALIGNMENT)


class Cast(Format):
    """Floating-point tensors travel as another type, and are cast back behind the message.

    To float8 each is scaled by a power of two, which travels along, found from its largest magnitude in the
    step before: delayed scaling, as in Micikevicius et al., FP8 Formats for Deep Learning, 2022. Where that
    does not fit the values of this step, they are packed once more.
    """

    def __init__(self, tensors: Sequence[Tensor], looks: list[Look], wire: torch.dtype) -> None:
        super().__init__(looks)
        first: dict[Look, int] = {}
        self._same_as = [first.setdefault(look, i) for i, look in enumerate(looks)]
        self._apart = list(first.values())
        apart = [tensors[i].detach() for i in self._apart]
        if share_memory(apart):
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
        self._unpackers: dict[torch.device, Packer] = {}  # by where messages are opened
        self._behind = aligned(self._layout.nbytes)
        self.sent_nbytes = self._layout.nbytes
        self.nbytes = self._behind + self._opened.nbytes

    def pack(self, tensors: Sequence[Tensor], regions: Sequence[Region], buffer: Tensor) -> None:
        sent = self._sent(tensors)
        if self._wire in _LARGEST:
            self._pack_scaled(sent, buffer)
        else:
            self._packer.rebind(sent)
            self._packer.pack(buffer)
        self._packer.release()

    def open(self, buffer: Tensor) -> list[Tensor]:
        opened = self._opened.views(buffer[self._behind :])
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
        apart = dict(zip(self._apart, opened))
        return [
            (torch.view_as_complex(apart[i]) if look.dtype.is_complex else apart[i]).data
            for i, look in zip(self._same_as, self.looks)
        ]

    def _sent(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_as_real(tensors[i].detach()) for i in self._apart]

    def _pack_scaled(self, sent: list[Tensor], buffer: Tensor) -> None:
        if self._largest is None:
            self._largest = torch.zeros(len(sent) + 1, device=buffer.device)
        # In place: other streams may still read what a new one would replace.
        self._largest.copy_(self._pack_by(_scales_for(self._largest, self._wire), sent, buffer))
        # On a GPU looking at them would wait for it.
        if not buffer.is_cuda and _misfit(self._scales_in(buffer), self._largest, self._wire):
            self._pack_by(_scales_for(self._largest, self._wire), sent, buffer)
        if self._wire == torch.float8_e4m3fn:  # it has no infinity: what held one arrives as NaN
            self._scales_in(buffer).masked_fill_(~self._largest.isfinite(), torch.nan)

    def _pack_by(self, scales: Tensor, sent: list[Tensor], buffer: Tensor) -> Tensor:
        """Packs with these scales; returns the largest magnitudes before scaling."""
        largest = torch.zeros_like(scales)
        self._packer.rebind([*sent, _bits(scales)])
        self._packer.pack(buffer, scales=scales, amax=largest)
        return largest

    def _scales_in(self, buffer: Tensor) -> Tensor:
        return self._layout.views(buffer)[-1].view(torch.float32)


def _is_copied_whole(look: Look) -> bool:
    return look.dtype in PACKABLE and look.is_contiguous and not look.negative


def _scales_for(largest: Tensor, wire: torch.dtype) -> Tensor:
    """With them the largest magnitudes come to lie in the upper half of what the wire type holds.

    Half, not all: this step's may be a little larger. 1 for a tensor of zeros, or of what is not finite.
    """
    exponents = torch.floor(torch.log2(_LARGEST[wire] / largest)) - 1
    return torch.exp2(torch.where(exponents.isfinite(), exponents, 0.0).clamp(-120, 120))


def _misfit(scales: Tensor, largest: Tensor, wire: torch.dtype) -> bool:
    """Whether a largest magnitude is too large for its scale, or so small that it loses precision."""
    scaled = largest * scales
    seen = largest.isfinite() & (largest > 0)
    return bool((seen & ((scaled > _LARGEST[wire]) | (scaled < _LARGEST[wire] / 64))).any())


def _is_cast(dtype: torch.dtype, wire: torch.dtype | None) -> bool:
    real = dtype.to_real() if dtype.is_complex else dtype
    return wire is not None and real in REPLACEABLE and real != wire


def _bits(scales: Tensor) -> Tensor:
    """Scales as integers, which travel as they are."""
    return scales.view(torch.int32)


def _as_real(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg()
