"""Tensors that a message may hold, and what has to become of them; for the CPU and for a GPU."""

import torch

from pipeline_ext.base.memory import find_regions
from pipeline_ext.transport.cast import Cast
from pipeline_ext.transport.format import AsIs
from pipeline_ext.transport.message import choose_format


def awkward(device):
    """Every kind of strides and type, each in memory of its own; and one tensor twice."""

    def base():
        return torch.randn(12, 10, device=device)

    twice = base()
    return [
        base()[:, 3:7],
        base().t(),
        base()[:, :1].expand(-1, 5),
        base().sum(),
        base()[:0],
        base().unfold(0, 4, 2),
        base()[::4, ::9],
        torch.complex(base(), base()).conj(),
        torch.complex(base(), base()).conj().imag,
        base().double()[1:],
        base().half(),
        base().bfloat16().flatten()[1:],
        torch.arange(7, device=device),
        base() > 0,
        twice,
        twice.detach(),
    ]


def sharing(device):
    """Tensors that look into the same memory."""
    base = torch.randn(12, 10, device=device)
    numbers = torch.complex(base, base * 2)
    left, right = torch.randn(6, 8, device=device).chunk(2, 1)
    return [
        base,
        base.view(-1),
        base.t(),
        base[:, 4:],
        base[5:6].expand(3, -1),
        numbers,
        numbers.conj(),
        numbers.conj().imag,
        torch.view_as_real(numbers),
        left,
        right,
    ]


def sent(tensors, wire=None):
    """Each as it arrives, and the buffer it arrived in."""
    format, regions = choose_format(tensors, wire, None)
    assert isinstance(format, AsIs if wire is None else Cast)
    for _ in range(2):  # once more, as in the next step
        buffer = torch.full(
            (-(-format.nbytes // 256) * 256,), 0xA5, dtype=torch.uint8, device=tensors[0].device
        )
        format.pack(tensors, regions, buffer)
        received = format.open(buffer)
    return received, buffer


def check_as_is(device):
    """What arrives has the values, types, strides and alignment of what was sent, in the message's memory."""
    for tensors in (awkward(device), sharing(device)):
        received, buffer = sent(tensors)
        for tensor, got in zip(tensors, received, strict=True):
            assert (got.dtype, got.device, got.shape) == (tensor.dtype, tensor.device, tensor.shape)
            assert (got.is_conj(), got.is_neg()) == (tensor.is_conj(), tensor.is_neg())
            assert torch.equal(got, tensor)
            assert got.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
            if tensor.numel() and tensor.shape != (3, 2):  # whose gaps are not worth sending
                assert got.stride() == tensor.stride()
                assert got.data_ptr() % 64 == tensor.data_ptr() % 64
        versions = [got._version for got in received]
        received[0].add_(1)
        assert [got._version for got in received[1:]] == versions[1:]


def check_shared(device):
    """A change in place of one is seen in the others, as at the sender's."""
    tensors = sharing(device)
    received, _ = sent(tensors)
    for change in (0, 5, 9):
        received[change].mul_(3)
        tensors[change].mul_(3)
        for tensor, got in zip(tensors, received):
            assert torch.equal(got, tensor)


def check_overlaps_travel_once(device):
    """Three parts of a row are sent as the row."""
    tensors = torch.randn(64, 96, device=device).chunk(3, dim=1)
    format, _ = choose_format(tensors, None, None)
    assert format.sent_nbytes == 64 * 96 * 4
    looks, regions = find_regions(tensors)
    assert len(regions) == 1 and [look.offset for look in looks] == [0, 128, 256]


def check_cast(device, wire, rounding):
    """What arrives is of the types that were sent, and rounded."""
    tensors = awkward(device)
    received, _ = sent(tensors, wire)
    for tensor, got in zip(tensors, received, strict=True):
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        if not (tensor.is_floating_point() or tensor.is_complex()):
            assert torch.equal(got, tensor)
        elif tensor.numel():
            largest = tensor.abs().max().item()
            error = (got.to(torch.complex128) - tensor.to(torch.complex128)).abs().max().item()
            assert error <= 1.5 * rounding * largest
    assert received[-1].data_ptr() == received[-2].data_ptr()
