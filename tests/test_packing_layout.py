"""Where tensors lie in a packed buffer."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from packing_cases import WIRES, mixed, tensors

import pipeline_ext as pe
from pipeline_ext.packing import ALIGNMENT, Layout, Slot


@settings(deadline=None)
@given(tensors())
def test_slots_lie_in_order_aligned_and_apart(given):
    for wire in WIRES:
        layout = Layout.of(given, wire)
        end = 0
        for slot, tensor in zip(layout.slots, given, strict=True):
            assert slot.offset % ALIGNMENT == 0
            assert end <= slot.offset < end + ALIGNMENT
            assert slot.nbytes == tensor.numel() * slot.wire.itemsize
            assert (slot.shape, slot.dtype, slot.count) == (tensor.shape, tensor.dtype, tensor.numel())
            end = slot.offset + slot.nbytes
        assert layout.nbytes == end


def test_a_wire_type_replaces_wide_floating_point_types_and_no_other():
    for slot in Layout.of(mixed(), torch.bfloat16).slots:
        wide = slot.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        assert slot.wire == (torch.bfloat16 if wide else slot.dtype)


def test_the_layout_of_a_small_case_is_this():
    layout = Layout.of([torch.zeros(3, 5), torch.zeros(0), torch.ones(2, dtype=torch.bool)], torch.float16)
    assert layout == Layout(
        (
            Slot(0, 30, (3, 5), torch.float32, torch.float16),
            Slot(256, 0, (0,), torch.float32, torch.float16),
            Slot(256, 2, (2,), torch.bool, torch.bool),
        ),
        258,
    )


def test_layouts_are_values():
    a, b = (Layout.of(mixed(), torch.bfloat16) for _ in range(2))
    assert len({a, b, Layout.of(mixed())}) == 2
    assert pickle.loads(pickle.dumps(a)) == a


def test_views_share_the_buffers_memory_and_no_byte_with_each_other():
    layout = Layout.of(mixed(), torch.bfloat16)
    buffer = torch.zeros(layout.nbytes + 7, dtype=torch.uint8)
    views = layout.views(buffer)
    for view, slot in zip(views, layout.slots, strict=True):
        assert (view.shape, view.dtype, view.is_contiguous()) == (slot.shape, slot.wire, True)
        view.view(-1).view(torch.uint8).add_(1)
    assert buffer.sum() == sum(slot.nbytes for slot in layout.slots)
    assert buffer.max() == 1


def test_no_tensors_need_no_bytes():
    assert Layout.of([]) == Layout((), 0)
    assert Layout.of([]).views(torch.empty(0, dtype=torch.uint8)) == []


@pytest.mark.parametrize(
    "buffer, said",
    [
        (torch.zeros(9, dtype=torch.uint8), "the buffer has 9 bytes; the layout needs 16"),
        (torch.zeros(16, dtype=torch.int8), "the buffer is int8[16]; give contiguous uint8[16]"),
        (torch.zeros(4, 4, dtype=torch.uint8), "the buffer is uint8[4, 4]; give contiguous uint8[16]"),
        (torch.zeros(64, dtype=torch.uint8)[::2], "the buffer is uint8[32]; give contiguous uint8[16]"),
        (torch.zeros(64, dtype=torch.uint8)[1:], "address is not a multiple of 16"),
    ],
    ids=["short", "type", "dimensions", "strided", "misaligned"],
)
def test_a_buffer_that_does_not_fit_is_refused(buffer, said):
    with pytest.raises(pe.PipelineError) as raised:
        Layout.of([torch.zeros(4)]).views(buffer)
    assert said in str(raised.value)


def test_types_that_cannot_be_packed_are_refused():
    with pytest.raises(pe.InvalidArgument, match=r"tensor 1 is complex64\[2\]; packed are float64, "):
        Layout.of([torch.zeros(2), torch.zeros(2, dtype=torch.complex64)])
    with pytest.raises(pe.InvalidArgument, match=r"wire is torch.int8; give one of float64, "):
        Layout.of([torch.zeros(2)], torch.int8)
