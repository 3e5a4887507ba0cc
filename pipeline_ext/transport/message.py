"""What the results of several microbatches look like as one message."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PipelineError
from ..packing import ALIGNMENT, Layout, packer

# A tensor with gaps in memory travels with them, up to this many times its own size; then without.
_WIDEST = 4


class Look(NamedTuple):
    """What tensors have in common that are packed in one and the same way."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    same_as: int  # number of the first tensor in the message that lies at the same place


def looks(tensors: Sequence[Tensor]) -> list[Look]:
    """The looks of the tensors of one message. Raises PipelineError for those that cannot be packed."""
    first: dict[tuple, int] = {}
    found = []
    for i, tensor in enumerate(tensors):
        plain = type(tensor) in (Tensor, nn.Parameter) and not tensor.is_nested
        if not plain or tensor.layout is not torch.strided:
            kind = "nested tensor" if tensor.is_nested else f"{type(tensor).__name__} of {tensor.layout}"
            raise PipelineError(
                f"a {kind} cannot be packed into a message, only plain dense tensors can; give pack=1 and no "
                "wire type"
            )
        same_as = first.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), i)
        found.append(Look(tensor.dtype, tensor.shape, tensor.stride(), same_as))
    return found


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
        self._apart = [i for i, look in enumerate(looks) if look.same_as == i]
        self._place = {i: place for place, i in enumerate(self._apart)}

    def pack(self, tensors: Sequence[Tensor], buffer: Tensor) -> None:
        """Writes the message."""
        self._pack([_as_real(tensors[i]) for i in self._apart], buffer)

    def open(self, buffer: Tensor) -> list[Tensor]:
        """The tensors of a message, as views of its buffer; to be called once.

        Each has a version of its own: one that is changed in place does not spoil the others.
        """
        apart = self._open(buffer)
        opened = []
        for look in self.looks:
            tensor = apart[self._place[look.same_as]]
            opened.append((torch.view_as_complex(tensor) if look.dtype.is_complex else tensor).data)
        return opened

    @abstractmethod
    def _pack(self, tensors: list[Tensor], buffer: Tensor) -> None: ...

    @abstractmethod
    def _open(self, buffer: Tensor) -> list[Tensor]: ...


class AsIs(Format):
    """Each tensor travels as the memory it spans, so that the receiver's has the same strides.

    On them sums and products may depend, to the last bit.
    """

    def __init__(self, tensors: Sequence[Tensor], looks: list[Look]) -> None:
        super().__init__(looks)
        apart = [_as_real(tensors[i]) for i in self._apart]
        self._strides = [t.stride() if _keeps_strides(t) else None for t in apart]
        self._shapes = [t.shape for t in apart]
        self._layout = Layout.of(self._spans(apart))
        self._packer = packer(self._layout, self._spans(apart))
        self.sent_nbytes = self.nbytes = self._layout.nbytes

    def _spans(self, tensors: list[Tensor]) -> list[Tensor]:
        return [
            tensor if strides is None else tensor.as_strided((_span(tensor),), (1,))
            for tensor, strides in zip(tensors, self._strides)
        ]

    def _pack(self, tensors: list[Tensor], buffer: Tensor) -> None:
        self._packer.rebind(self._spans(tensors))
        self._packer.pack(buffer)
        self._packer.release()

    def _open(self, buffer: Tensor) -> list[Tensor]:
        return [
            view if strides is None else view.as_strided(shape, strides)
            for view, shape, strides in zip(self._layout.views(buffer), self._shapes, self._strides)
        ]


class Cast(Format):
    """Floating-point tensors travel as another type, and are cast back behind the message.

    To float8 each is scaled by a power of two, which travels along, found from its largest magnitude in the
    step before: delayed scaling, as in Micikevicius et al., FP8 Formats for Deep Learning, 2022.
    """

    _LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}  # finite numbers

    def __init__(self, tensors: Sequence[Tensor], looks: list[Look], wire: torch.dtype) -> None:
        super().__init__(looks)
        apart = [_as_real(tensors[i]) for i in self._apart]
        self._largest_number = self._LARGEST.get(wire)
        if self._largest_number is not None:
            scales = torch.ones(len(apart) + 1, device=apart[0].device)
            apart.append(_bits(scales))
        self._layout = Layout.of(apart, wire)
        self._opened = Layout.of(apart)
        self._packer = packer(self._layout, apart)
        self._unpacker = packer(self._layout, apart)
        self._unpacker.release()
        self._behind = -(-self._layout.nbytes // ALIGNMENT) * ALIGNMENT
        self._largest: Tensor | None = None  # magnitude in each slot, in the message before
        self.sent_nbytes = self._layout.nbytes
        self.nbytes = self._behind + self._opened.nbytes

    def _pack(self, tensors: list[Tensor], buffer: Tensor) -> None:
        if self._largest_number is None:
            self._packer.rebind(tensors)
            self._packer.pack(buffer)
        else:
            if self._largest is None:
                self._largest = self._measure(tensors, buffer)
            scales = self._scales(self._largest)
            self._largest.zero_()
            self._packer.rebind([*tensors, _bits(scales)])
            self._packer.pack(buffer, scales=scales, amax=self._largest)
        self._packer.release()

    def _measure(self, tensors: list[Tensor], buffer: Tensor) -> Tensor:
        scales = torch.ones(len(tensors) + 1, device=buffer.device)
        largest = torch.zeros_like(scales)
        self._packer.rebind([*tensors, _bits(scales)])
        self._packer.pack(buffer, amax=largest)
        return largest

    def _scales(self, largest: Tensor) -> Tensor:
        """With them the largest magnitudes come to lie in the upper half of what the wire type holds.

        Half, not all: this step's may be a little larger. 1 for a tensor of zeros, or of what is not finite.
        """
        exponents = torch.floor(torch.log2(self._largest_number / largest)) - 1
        return torch.exp2(torch.where(exponents.isfinite(), exponents, 0.0).clamp(-120, 120))

    def _open(self, buffer: Tensor) -> list[Tensor]:
        opened = self._opened.views(buffer[self._behind :])
        self._unpacker.rebind(opened)
        if self._largest_number is None:
            self._unpacker.unpack(buffer)
        else:
            scales = self._layout.views(buffer)[-1].view(torch.float32)
            self._unpacker.unpack(buffer, scales=1.0 / scales)
            opened.pop()
        self._unpacker.release()
        return opened


def _bits(scales: Tensor) -> Tensor:
    """Scales as integers, which travel as they are."""
    return scales.view(torch.int32)


def _as_real(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg()


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last one in memory."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))


def _keeps_strides(tensor: Tensor) -> bool:
    """Whether a tensor is to travel with its strides, which are not those of rows."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return False
    return _span(tensor) <= _WIDEST * tensor.numel()
