"""Tensors that a message may hold, and what has to become of them; for the CPU and for a GPU."""

import torch

from pipeline_ext.transport.message import AsIs, Cast, looks


def awkward(device):
    """Every kind of strides and type, and one tensor twice."""
    base = torch.randn(12, 10, device=device)
    return [
        base[:, 3:7],
        base.t(),
        base[:, :1].expand(-1, 5),
        base.sum(),
        base[:0],
        base.unfold(0, 4, 2),
        base[::40, ::9],
        torch.complex(base, base * 2).conj(),
        torch.complex(base, base).imag,
        base.double(),
        base.half(),
        base.bfloat16(),
        torch.arange(7, device=device),
        base > 0,
        base,
        base.view(12, 10),
    ]


def check_as_is(device):
    """What arrives has the values, types and strides of what was sent, in the message's own memory."""
    tensors = awkward(device)
    format = AsIs(tensors, looks(tensors))
    for _ in range(2):
        buffer = torch.full((format.nbytes,), 0xA5, dtype=torch.uint8, device=device)
        format.pack(tensors, buffer)
        received = format.open(buffer)
        for sent, got in zip(tensors, received, strict=True):
            assert got.dtype == sent.dtype and got.device == sent.device
            assert torch.equal(got, sent)
            if sent.numel() and sent is not tensors[6]:  # whose gaps are not worth sending
                assert got.stride() == sent.stride()
            storage = got.untyped_storage().data_ptr()
            assert got.numel() == 0 or storage == buffer.untyped_storage().data_ptr()
        *_, first, again = received
        assert first.data_ptr() == again.data_ptr()
        versions = [got._version for got in received]
        received[0].add_(1)
        assert [got._version for got in received[1:]] == versions[1:]
        tensors = [t.clone() if t.is_contiguous() and i < 14 else t for i, t in enumerate(tensors)]


def check_cast(device, wire, rounding):
    """What arrives is of the types that were sent, and rounded."""
    tensors = awkward(device)
    format = Cast(tensors, looks(tensors), wire)
    for _ in range(2):
        buffer = torch.full((format.nbytes,), 0xA5, dtype=torch.uint8, device=device)
        format.pack(tensors, buffer)
        for sent, got in zip(tensors, format.open(buffer), strict=True):
            assert got.dtype == sent.dtype and got.shape == sent.shape
            if not (sent.is_floating_point() or sent.is_complex()):
                assert torch.equal(got, sent)
            elif sent.numel():
                largest = sent.abs().max().item()
                error = (got.to(torch.complex128) - sent.to(torch.complex128)).abs().max().item()
                assert error <= 1.5 * rounding * largest
    assert format.sent_nbytes < sum(t.nbytes for t in tensors)
