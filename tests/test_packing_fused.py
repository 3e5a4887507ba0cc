"""What the packing kernels read, and what is particular to them; run by Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from packing_cases import POISON, check_outside, check_slots, mixed, poisoned, tensors, whole

from pipeline_ext.packing import Layout

pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("with a GPU the kernels are not interpreted; tests/gpu runs them", allow_module_level=True)

from pipeline_ext.packing import kernels
from pipeline_ext.packing.fused import FusedPacker
from pipeline_ext.packing.tables import (
    BLOCK,
    OFFSET,
    WIDE,
    blocks,
    chunk_table,
    collapse,
    kinds,
    room,
    slot_table,
)

CHUNK = BLOCK * blocks(torch.uint8)  # of a program

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, the interpreter's arithmetic


def test_rebound_tensors_are_packed_by_the_same_tables():
    first, second = (mixed() for _ in range(2))
    layout = Layout.of(first, torch.bfloat16)
    packer = FusedPacker(layout, first)
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
    packer = FusedPacker(layout, given)
    packer.pack(buffer, launch=False)
    packer.unpack(buffer, launch=False)
    assert (around == around[0]).all()
    packer.pack(buffer)
    check_slots(layout, buffer, given)


def test_every_element_is_in_one_chunk():
    layout = Layout.of(mixed())
    sizes = [BLOCK * blocks(slot.dtype) for slot in layout.slots]
    rows = chunk_table(layout).tolist()
    elements = [(slot, chunk * sizes[slot] + i) for slot, chunk in rows for i in range(sizes[slot])]
    inside = [(slot, i) for slot, i in elements if i < layout.slots[slot].count]
    assert inside == [(slot, i) for slot, s in enumerate(layout.slots) for i in range(s.count)]


def test_128_bit_accesses_are_for_whole_blocks_of_row_major_tensors_at_aligned_addresses():
    tensor = torch.zeros(2 * BLOCK + 5)
    for source, wide in [
        (tensor, 2 * BLOCK),
        (tensor.view(1, -1, 1), 2 * BLOCK),
        (tensor[4:], 2 * BLOCK),
        (tensor[1:], 0),
        (tensor[::2], 0),
        (tensor[:1].expand(BLOCK), 0),
        (tensor[: BLOCK - 1], 0),
    ]:
        assert slot_table(Layout.of([source]), [source])[0, WIDE] == wide


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
    slots = slot_table(layout, [tensor])
    slots[0, OFFSET] -= first
    buffer = torch.full((2 * CHUNK,), POISON, dtype=torch.uint8)
    constants = kernels.constants(kinds(layout), room(layout), slot.count)
    kernels.pack[(2,)](chunks, slots, buffer, 1.0, None, None, None, SCALED=False, **constants)
    last = slot.count - first
    assert torch.equal(buffer[:last], tensor[-(last // 7 + 1) :].flatten()[-last:])
    assert (buffer[last:] == POISON).all()
