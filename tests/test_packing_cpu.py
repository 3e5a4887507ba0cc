"""Packing on the CPU: any tensors into one buffer and back, with the bits of torch's own casts."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline_ext import InvalidArgument
from pipeline_ext.packing.cpu import packer

ALIGNMENT = 256
CAST = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOATING = (*CAST, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGER = (torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)
OTHERS = (torch.complex64, torch.complex128, torch.float8_e4m3fnuz, torch.float8_e8m0fnu)
INF, NAN = math.inf, math.nan


def layout_of(tensors, wire=None):
    """The slots of tensors; ``wire`` replaces the types of CAST."""
    slots, end = [], 0
    for tensor in tensors:
        travels = wire if wire is not None and tensor.dtype in CAST else tensor.dtype
        offset = math.ceil(end / ALIGNMENT) * ALIGNMENT
        slots.append(SimpleNamespace(offset=offset, shape=tensor.shape, dtype=tensor.dtype, wire=travels))
        end = offset + tensor.numel() * travels.itemsize
    return SimpleNamespace(slots=slots, nbytes=end)


def poisoned(nbytes):
    return torch.full((nbytes,), 0xA5, dtype=torch.uint8)


def views(layout, buffer):
    return [
        buffer[s.offset : s.offset + s.shape.numel() * s.wire.itemsize].view(s.wire).view(s.shape)
        for s in layout.slots
    ]


def packed(tensors, wire=None, **options):
    """The slots' values after packing, as a list of tensors."""
    layout = layout_of(tensors, wire)
    buffer = poisoned(layout.nbytes)
    packer(layout).pack(tensors, buffer, **options)
    return views(layout, buffer)


def same_bits(a, b):
    """Whether two lists of tensors agree in shapes, types and every bit."""

    def raw(tensor):
        dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        return dense.flatten().view(torch.uint8)

    return all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(raw(x), raw(y))
        for x, y in zip(a, b, strict=True)
    )


def filled(shape, dtype, generator):
    """Numbers of many sizes within every type's range, subnormal ones among them; or random bytes."""
    if dtype in FLOATING:
        size = torch.randint(-20, 6, shape, generator=generator)
        return torch.ldexp(torch.randn(shape, generator=generator, dtype=torch.float64), size).to(dtype)
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw[..., 0] > 127 if dtype == torch.bool else raw.view(dtype)[..., 0]


@st.composite
def tensors(draw, dtypes):
    """Some tensors of several types, shapes and strides."""

    def one():
        shape = draw(st.lists(st.sampled_from((0, 1, 2, 3, 7, 40)), max_size=4))
        order = draw(st.permutations(range(len(shape))))
        steps = [draw(st.sampled_from((1, 1, 2))) for _ in shape]
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        whole = filled(
            tuple(shape[d] * steps[d] for d in order), draw(st.sampled_from(dtypes)), generator
        )
        inverse = [order.index(d) for d in range(len(shape))]
        return whole.permute(inverse)[tuple(slice(None, None, step) for step in steps)]

    return [one() for _ in range(draw(st.integers(0, 4)))]


examples = settings(deadline=None, max_examples=100)
wires = st.sampled_from((None, *FLOATING))


@examples
@given(tensors((*FLOATING, *INTEGER, *OTHERS)), wires)
def test_a_slot_holds_what_torch_casts_to_and_the_rest_of_the_buffer_is_untouched(given_, wire):
    layout = layout_of(given_, wire)
    buffer, expected = poisoned(layout.nbytes + 300), poisoned(layout.nbytes + 300)
    packer(layout).pack(given_, buffer)
    for view, tensor in zip(views(layout, expected), given_):
        view.copy_(tensor.to(view.dtype))
    assert torch.equal(buffer, expected)


@examples
@given(tensors((*FLOATING, *INTEGER, *OTHERS)), wires)
def test_a_tensor_of_any_strides_gets_what_torch_casts_back(given_, wire):
    layout = layout_of(given_, wire)
    buffer = poisoned(layout.nbytes)
    packs = packer(layout)
    packs.pack(given_, buffer)
    # Every second element along each dimension, the first of which runs along memory.
    around = [torch.zeros([2 * n for n in reversed(t.shape)], dtype=t.dtype) for t in given_]
    inside = [
        whole[tuple(slice(None, None, 2) for _ in whole.shape)].permute(tuple(reversed(range(whole.dim()))))
        for whole in around
    ]
    packs.unpack(inside, buffer)
    assert same_bits(inside, [v.to(t.dtype) for v, t in zip(views(layout, buffer), given_)])
    for tensor in inside:
        tensor.zero_()
    assert same_bits(around, [torch.zeros_like(whole) for whole in around])


@examples
@given(tensors(FLOATING), wires, st.sampled_from((0.125, 3.1)), st.booleans())
def test_values_are_scaled_before_they_are_cast(given_, wire, scale, by_slot):
    scales = torch.rand(len(given_)) if by_slot else torch.ones(len(given_))
    found = packed(given_, wire, scale=scale, scales=scales if by_slot else None)
    for value, tensor, one in zip(found, given_, scales):
        arithmetic = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        factor = torch.tensor(scale, dtype=arithmetic) * one.to(arithmetic)
        assert same_bits([value], [(tensor.to(arithmetic) * factor).to(value.dtype)])


@examples
@given(tensors(FLOATING), wires, st.sampled_from((1.0, 0.3)))
def test_sums_are_rounded_once(given_, wire, scale):
    layout = layout_of(given_, wire)
    buffer = poisoned(layout.nbytes)
    packs = packer(layout)
    packs.pack(given_, buffer)
    sums = [torch.full_like(t, 0.7) for t in given_]
    expected = []
    for before, view in zip(sums, views(layout, buffer)):
        arithmetic = torch.float64 if before.dtype == torch.float64 else torch.float32
        added = view.to(arithmetic) * torch.tensor(scale, dtype=arithmetic)
        expected.append((before.to(arithmetic) + added).to(before.dtype))
    packs.unpack(sums, buffer, scale=scale, accumulate=True)
    assert same_bits(sums, expected)


@pytest.mark.parametrize("dtype", CAST)
def test_what_is_beyond_the_range_of_a_type(dtype):
    given_ = [torch.tensor([449.0, 480.0, 1e5, -1e5, INF, -INF], dtype=torch.float64).to(dtype)]
    in_e4m3fn = packed(given_, torch.float8_e4m3fn)[0].float()
    assert in_e4m3fn.tolist() == [448.0, 448.0, 448.0, -448.0, 448.0, -448.0]
    in_e5m2 = packed(given_, torch.float8_e5m2)[0].float()
    assert in_e5m2.tolist() == [448.0, 512.0, INF, -INF, INF, -INF]
    if dtype != torch.float16:
        in_float16 = packed(given_, torch.float16)[0].float()
        assert in_float16[2:].tolist() == [INF, -INF, INF, -INF]


@pytest.mark.parametrize("wire", FLOATING)
@pytest.mark.parametrize("dtype", CAST)
def test_every_bit_pattern_of_a_type_comes_back(dtype, wire):
    # All float16 and bfloat16 values; of the others, as many with random low bits.
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    if dtype.itemsize > 2:
        given_ = (patterns.view(torch.bfloat16).double() * 1.00390625).to(dtype)
    else:
        given_ = patterns.view(dtype)
    found, expected = packed([given_], wire)[0].double(), given_.to(wire).double()
    nan = given_.isnan()
    assert found[nan].isnan().all() and not found[~nan].isnan().any()
    inside = ~nan & (given_.abs() <= 448)
    assert torch.equal(found[inside], expected[inside])
    assert torch.equal(found[inside].signbit(), expected[inside].signbit())


def test_amax_is_of_the_values_before_scaling_and_nonfinite_is_never_cleared():
    given_ = [
        torch.tensor([[1.0, -3.0], [2.0, 0.5]]).t(),
        torch.empty(0),
        torch.tensor([7, 9]),
        torch.tensor(-1e-3, dtype=torch.float64),
        torch.linspace(-5, 4, 5001).bfloat16(),
    ]
    amax, nonfinite = torch.full((5,), 99.0), torch.zeros(1, dtype=torch.int32)
    packed(given_, torch.float8_e4m3fn, scale=10.0, amax=amax, nonfinite=nonfinite)
    assert amax.tolist() == pytest.approx([3.0, 0.0, 0.0, 1e-3, 5.0])
    assert nonfinite.item() == 0
    for bad in (NAN, INF, -INF):
        given_[4][4321] = bad
        packed(given_, amax=amax, nonfinite=nonfinite)
        assert nonfinite.item() == 1
        assert amax[4].isnan() if math.isnan(bad) else amax[4] == INF
        nonfinite.zero_()
    nonfinite.fill_(1)
    packed(given_[:4], nonfinite=nonfinite)
    assert nonfinite.item() == 1


def test_a_large_message_that_bypasses_the_caches_holds_the_same():
    given_ = [torch.randn(3 << 20), torch.randn(1537, 1023).t(), torch.arange(700_001)]
    assert same_bits(packed(given_), given_)
    found = packed([given_[0]] * 12, torch.bfloat16)
    assert same_bits(found, [given_[0].bfloat16()] * 12)


def test_numpy_arrays_are_packed_and_unpacked():
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = [whole[::-1, ::-2], whole.T, np.array(3, dtype=np.int64), np.zeros((0, 2), dtype=bool)]
    layout = layout_of([torch.from_numpy(array.copy()) for array in arrays])
    packs, buffer = packer(layout), np.zeros(layout.nbytes, dtype=np.uint8)
    packs.pack(arrays, buffer)
    results = [np.zeros_like(array[::-1] if array.ndim else array) for array in arrays]
    packs.unpack(results, buffer)
    assert all(np.array_equal(result, array) for result, array in zip(results, arrays))


def test_tensors_that_require_gradients_are_packed_also_where_there_is_no_exchange_interface():
    class Old:
        """As a tensor of an older torch."""

        def __init__(self, tensor):
            self.tensor = tensor

        def detach(self):
            return Old(self.tensor.detach())

        def __dlpack__(self):
            return self.tensor.__dlpack__()

    weight = torch.nn.Parameter(torch.randn(3, 5))
    layout = layout_of([weight])
    buffer = poisoned(layout.nbytes)
    for tensor in (weight, Old(weight)):
        buffer.fill_(0)
        packer(layout).pack([tensor], buffer)
        assert same_bits(views(layout, buffer), [weight])


FLOATS = torch.zeros(4, 8)
LAYOUT = layout_of([FLOATS])
BUFFER = torch.zeros(128, dtype=torch.uint8)
READ_ONLY = np.zeros(128, dtype=np.uint8)
READ_ONLY.flags.writeable = False
IMAGINARY = torch.zeros(4, 8, dtype=torch.complex64).conj().imag


@pytest.mark.parametrize(
    "given_, buffer, options, why",
    [
        ([], BUFFER, {}, "the layout has 1 slots; got 0 tensors"),
        ([FLOATS.t()], BUFFER, {}, r"tensor 0 is float32\[8, 4\] where the layout has float32\[4, 8\]"),
        ([FLOATS.half()], BUFFER, {}, r"tensor 0 is float16\[4, 8\] where the layout has float32"),
        ([3.0], BUFFER, {}, "tensor 0 is of type float; give a tensor or an array"),
        ([FLOATS.to_sparse()], BUFFER, {}, "tensor 0 does not lend its memory: Cannot access data pointer"),
        ([FLOATS.to("meta")], BUFFER, {}, "tensor 0 does not lend its memory: Cannot pack tensors on meta"),
        ([IMAGINARY], BUFFER, {}, "tensor 0 is a view that negates or conjugates"),
        ([FLOATS], BUFFER[:127], {}, r"at least 128 bytes; got uint8\[127\]"),
        ([FLOATS], torch.zeros(129, dtype=torch.uint8)[1:], {}, "address must be a multiple of 16"),
        ([FLOATS], torch.zeros(256, dtype=torch.uint8)[::2], {}, "the buffer must be contiguous"),
        ([FLOATS], BUFFER.view(torch.int8), {}, r"uint8, and of at least 128 bytes; got int8\[128\]"),
        ([FLOATS], BUFFER.view(2, 64), {}, "of one dimension"),
        ([FLOATS], READ_ONLY, {}, "the buffer does not lend its memory: .*readonly"),
        ([FLOATS], BUFFER, {"scales": torch.ones(2)}, "scales must be contiguous, of float32 and 1 elements"),
        ([FLOATS], BUFFER, {"amax": torch.ones(1).double()}, "amax must be .* float32"),
        ([FLOATS], BUFFER, {"nonfinite": torch.zeros(1)}, "nonfinite must be .* int32"),
    ],
)
def test_what_cannot_be_packed_is_refused_in_a_sentence(given_, buffer, options, why):
    with pytest.raises(InvalidArgument, match=why):
        packer(LAYOUT).pack(given_, buffer, **options)
    assert not BUFFER.any()


def test_what_cannot_be_unpacked_is_refused_and_nothing_is_written():
    first = torch.zeros(3)
    for second, options, why in [
        (torch.zeros(1).expand(3), {}, "tensor 1 is expanded"),
        (torch.zeros(3, dtype=torch.int32), {"accumulate": True}, "tensor 1 is int32, which nothing can be"),
        (torch.zeros(3, dtype=torch.complex64), {"scale": 2.0}, "tensors of complex64 cannot be scaled"),
    ]:
        layout = layout_of([first, second])
        with pytest.raises(InvalidArgument, match=why):
            packer(layout).unpack([first, second], poisoned(layout.nbytes), **options)
        assert not first.any()


@pytest.mark.parametrize(
    "offset, nbytes, dtype, wire, why",
    [
        (8, 64, torch.float32, torch.float32, "must begin at a multiple of 16"),
        (64, 64, torch.float32, torch.float32, "slot 0, 12 bytes at 64, .* within the buffer's 64"),
        (0, 64, torch.int32, torch.float32, "slot 0 would cast int32 to float32"),
        (0, 64, torch.quint8, torch.quint8, "tensors of quint8 cannot be packed"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(offset, nbytes, dtype, wire, why):
    slot = SimpleNamespace(offset=offset, shape=(3,), dtype=dtype, wire=wire)
    with pytest.raises(InvalidArgument, match=why):
        packer(SimpleNamespace(slots=[slot], nbytes=nbytes))
