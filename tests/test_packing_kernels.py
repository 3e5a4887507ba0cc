"""The packing kernels, run by Triton's interpreter, do what torch does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_cases import (
    POISON,
    STRIDINGS,
    check_outside,
    check_pack,
    check_slots,
    check_unpack,
    mixed,
    poisoned,
    same,
    tensors,
    whole,
)

import pipeline_ext as pe
from pipeline_ext.packing import Layout, Packer
from pipeline_ext.packing.layout import FLOATING
from pipeline_ext.packing.tables import CHUNK, OFFSET, WIDE, chunk_table, collapse, kinds, slot_table

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels are not interpreted; tests/gpu runs them", allow_module_level=True)

from pipeline_ext.packing import kernels  # noqa: E402  (only with triton)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, the interpreter's arithmetic

wires = st.sampled_from([None, *FLOATING])
scales = st.sampled_from([1.0, 1 / 3, -2.0, 1e-4, 3e38])
some = settings(deadline=None, max_examples=60)


@some
@given(tensors(), wires, scales, st.booleans())
def test_pack_does_what_torch_does(given, wire, scale, scaled):
    check_pack(given, wire, scale, scaled)


@some
@given(tensors(STRIDINGS[:4]), wires, scales, st.booleans())
def test_unpack_does_what_torch_does(given, wire, scale, scaled):
    check_unpack(given, wire, scale, scaled)


@some
@given(tensors(STRIDINGS[:4], FLOATING), wires, scales, st.booleans())
def test_unpack_adds_and_rounds_once(given, wire, scale, scaled):
    check_unpack(given, wire, scale, scaled, accumulate=True)


@pytest.mark.parametrize("wire", [None, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_one_launch_moves_every_type_and_size(wire):
    check_pack(mixed(STRIDINGS), wire)
    check_unpack(mixed(), wire)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
def test_what_travels_as_it_is_keeps_its_bits(dtype):
    """Those of a NaN too."""
    bits = torch.randint(256, (20_000,), dtype=torch.uint8)
    tensor = bits.view(dtype)
    layout = Layout.of([tensor])
    buffer, _ = poisoned(layout, "cpu")
    packer = Packer(layout, [tensor])
    packer.pack(buffer, amax=torch.zeros(1))
    assert torch.equal(layout.views(buffer)[0].view(torch.uint8), bits)
    bits.zero_()
    packer.unpack(buffer)
    assert torch.equal(layout.views(buffer)[0].view(torch.uint8), bits)


def test_casts_are_torchs_for_every_number_of_a_type_and_wherever_rounding_turns():
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        bits = torch.arange(2 ** (8 * dtype.itemsize))
        codes = bits.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
        layout = Layout.of([codes.float()], dtype)
        decoded = torch.zeros(codes.shape)
        Packer(layout, [decoded]).unpack(codes.view(torch.uint8))
        assert same(decoded, codes.float())
        numbers = codes.double()
        numbers = numbers[numbers.isfinite()].unique()
        between = ((numbers[1:] + numbers[:-1]) / 2).float()
        beside = [between.nextafter(torch.tensor(side)) for side in (math.inf, -math.inf)]
        check_pack([torch.cat([numbers.float(), between, *beside])], wire=dtype)


@pytest.mark.parametrize(
    "wire, relative, absolute",
    [
        (torch.bfloat16, 2**-8, 2**-134),
        (torch.float16, 2**-11, 2**-25),
        (torch.float8_e4m3fn, 2**-4, 2**-10),
        (torch.float8_e5m2, 2**-3, 2**-17),
    ],
    ids=str,
)
def test_a_wire_type_loses_no_more_than_half_its_last_bit(wire, relative, absolute):
    tensor = torch.randn(10_000) * 10.0 ** torch.linspace(-6, 1, 10_000)
    back = torch.empty_like(tensor)
    layout = Layout.of([tensor], wire)
    buffer, _ = poisoned(layout, "cpu")
    Packer(layout, [tensor]).pack(buffer)
    Packer(layout, [back]).unpack(buffer)
    assert ((back - tensor).abs() <= (relative * tensor.abs()).clamp(min=absolute)).all()
    assert ((back - tensor).abs() > relative / 4 * tensor.abs()).any()  # the bound is near


def test_scales_of_slots_use_the_range_of_float8():
    """As they are meant: amax of one step scales the next, and its inverse undoes that."""
    tensors = [torch.randn(50, 50) * size for size in (1e-6, 1.0, 1e6)]
    layout = Layout.of(tensors, torch.float8_e4m3fn)
    buffer, _ = poisoned(layout, "cpu")
    amax = torch.zeros(3)
    packer = Packer(layout, tensors)
    packer.pack(buffer, amax=amax)
    assert amax.tolist() == [tensor.abs().max().item() for tensor in tensors]
    scales = 448 / amax
    packer.pack(buffer, scales=scales)
    back = [torch.empty_like(tensor) for tensor in tensors]
    Packer(layout, back).unpack(buffer, scales=1 / scales)
    for a, b, largest in zip(tensors, back, amax):
        assert ((a - b).abs() <= (a.abs() * 2**-4 * 1.001).clamp(min=2**-10 * largest / 448 * 1.001)).all()


def test_amax_only_rises_and_the_flag_is_never_cleared():
    tensors = [torch.tensor([1.0, -3.0]), torch.tensor([5, 6]), torch.empty(0)]
    layout = Layout.of(tensors)
    buffer, _ = poisoned(layout, "cpu")
    amax, nonfinite = torch.tensor([2.0, 2.0, 2.0]), torch.ones(1, dtype=torch.int32)
    packer = Packer(layout, tensors)
    packer.pack(buffer, amax=amax, nonfinite=nonfinite)
    assert (amax.tolist(), nonfinite.item()) == ([3.0, 2.0, 2.0], 1)
    tensors[0][0] = math.nan
    packer.pack(buffer, amax=amax)
    assert amax.isnan().tolist() == [True, False, False]


def test_rebound_tensors_are_packed_by_the_same_tables():
    first, second = (mixed() for _ in range(2))
    layout = Layout.of(first, torch.bfloat16)
    packer = Packer(layout, first)
    places = [packer._slots.data_ptr(), packer._chunks.data_ptr()]
    packer.rebind(second)
    buffer, around = poisoned(layout, "cpu")
    packer.pack(buffer)
    check_slots(layout, buffer, second)
    check_outside(layout, around)
    assert [packer._slots.data_ptr(), packer._chunks.data_ptr()] == places


def test_without_launch_nothing_is_written():
    given = mixed()
    layout = Layout.of(given)
    buffer, around = poisoned(layout, "cpu")
    packer = Packer(layout, given)
    packer.pack(buffer, launch=False)
    packer.unpack(buffer, launch=False)
    assert (around == around[0]).all()
    packer.pack(buffer)
    check_slots(layout, buffer, given)


def test_every_element_is_in_one_chunk():
    layout = Layout.of(mixed())
    elements = [(slot, chunk * CHUNK + i) for slot, chunk in chunk_table(layout).tolist() for i in range(CHUNK)]
    inside = [(slot, i) for slot, i in elements if i < layout.slots[slot].count]
    assert inside == [(slot, i) for slot, s in enumerate(layout.slots) for i in range(s.count)]


def test_128_bit_accesses_are_for_whole_chunks_of_row_major_tensors_at_aligned_addresses():
    tensor = torch.zeros(2 * CHUNK + 5)
    for source, wide in [
        (tensor, 2 * CHUNK),
        (tensor.view(1, -1, 1), 2 * CHUNK),
        (tensor[4:], 2 * CHUNK),
        (tensor[1:], 0),
        (tensor[::2], 0),
        (tensor[:1].expand(CHUNK), 0),
        (tensor[: CHUNK - 1], 0),
    ]:
        assert slot_table(Layout.of([source]), [source], 1)[0, WIDE] == wide


@settings(deadline=None)
@given(tensors())
def test_collapsed_dimensions_reach_the_same_elements_in_order(given):
    for tensor in given:
        dimensions = collapse(tensor)[::-1]
        again = tensor.as_strided([size for size, _ in dimensions], [stride for _, stride in dimensions])
        assert len(dimensions) <= tensor.dim()
        places = torch.arange(whole(tensor).numel())
        a, b = (places.as_strided(t.shape, t.stride(), t.storage_offset()) for t in (again, tensor))
        assert torch.equal(a.flatten(), b.flatten())


def far_strided(count):
    """More elements than uint32 counts, stored as seven."""
    return torch.arange(7, dtype=torch.uint8).expand(count // 7, 7)


def far_row_major(count):
    """As many elements, of which memory is taken only for the last ones."""
    tensor = torch.empty(count, dtype=torch.uint8)
    tensor[-2 * CHUNK :] = torch.randint(256, (2 * CHUNK,))
    return tensor.view(-1, 7)


@pytest.mark.parametrize("make", [far_strided, far_row_major])
def test_offsets_beyond_32_bits(make):
    """Runs the last two chunks alone, into a buffer that begins where they lie."""
    tensor = make(2**32 + 7 * CHUNK - 2**32 % 7)
    layout = Layout.of([tensor])
    (slot,) = layout.slots
    chunks = chunk_table(layout)[-2:].contiguous()
    first = chunks[0, 1].item() * CHUNK
    slots = slot_table(layout, [tensor], 2)
    slots[0, OFFSET] -= first
    buffer = torch.full((2 * CHUNK,), POISON, dtype=torch.uint8)
    constants = kernels.constants(kinds(layout), 2, slot.count)
    kernels.pack[(2,)](chunks, slots, buffer, 1.0, None, None, None, SCALED=False, **constants)
    last = slot.count - first
    assert torch.equal(buffer[:last], tensor[-(last // 7 + 1) :].flatten()[-last:])
    assert (buffer[last:] == POISON).all()


@pytest.mark.parametrize(
    "use, said",
    [
        (lambda p, b: p.pack(b[:-1]), r"the buffer has 263 bytes; the layout needs 264"),
        (lambda p, b: p.pack(b, scales=torch.ones(3)), r"scales is float32\[3\]; give contiguous float32\[2\]"),
        (lambda p, b: p.pack(b, amax=torch.ones(2).half()), r"amax is float16\[2\]"),
        (lambda p, b: p.pack(b, nonfinite=torch.ones(1)), r"nonfinite is float32\[1\]"),
        (lambda p, b: p.pack(b.to("meta")), r"buffer is on meta; the packer is on cpu"),
        (lambda p, b: p.unpack(b, accumulate=True), r"tensor 1 is int64\[1\]; only floating-point types"),
        (lambda p, b: p.rebind([torch.zeros(2)]), r"1 tensors; the layout has 2 slots"),
        (lambda p, b: p.rebind([torch.zeros(2), torch.zeros(1).long().to("meta")]), r"tensor 1 is on meta"),
    ],
)
def test_what_does_not_fit_is_refused(use, said):
    given = [torch.zeros(2), torch.zeros(1, dtype=torch.int64)]
    layout = Layout.of(given)
    buffer = torch.full((264,), POISON, dtype=torch.uint8)
    with pytest.raises(pe.InvalidArgument, match=said):
        use(Packer(layout, given), buffer[: layout.nbytes])
    assert (buffer == POISON).all()


def test_tensors_of_more_dimensions_than_before_need_another_packer():
    layout = Layout.of([torch.zeros(4, 4)])
    packer = Packer(layout, [torch.zeros(4, 4)])
    with pytest.raises(pe.InvalidArgument, match=r"tensor 0 has strides \(1, 4\), 2 dimensions"):
        packer.rebind([torch.zeros(4, 4).t()])


def test_unpacking_into_shared_memory_is_refused():
    given = [torch.zeros(1).expand(4)]
    layout = Layout.of(given)
    buffer, _ = poisoned(layout, "cpu")
    with pytest.raises(pe.InvalidArgument, match="tensor 0 is expanded"):
        Packer(layout, given).unpack(buffer)


def test_on_the_cpu_a_packer_wants_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(pe.InvalidArgument, match="the tensors are on cpu; give tensors on a CUDA device"):
        Packer(Layout.of([torch.zeros(2)]), [torch.zeros(2)])
