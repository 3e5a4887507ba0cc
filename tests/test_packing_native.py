"""What is particular to packing on the CPU: long messages, tensors of old torches, slots that cannot be."""

import threading

import pytest
import torch

from pipeline_ext import InvalidArgument
from pipeline_ext.packing import Layout, Slot, packer


def packed(tensors, wire=None):
    """The slots' values after packing."""
    layout = Layout.of(tensors, wire)
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    packer(layout, tensors).pack(buffer)
    return layout.views(buffer)


def test_a_long_message_that_bypasses_the_caches_holds_the_same():
    given = [torch.randn(3 << 20), torch.randn(1537, 1023).t(), torch.arange(700_001)]
    assert all(map(torch.equal, packed(given), given))
    halves = packed([given[0]] * 12, torch.bfloat16)
    assert all(torch.equal(half, given[0].bfloat16()) for half in halves)


def test_tensors_that_require_gradients_are_packed_also_where_there_is_no_exchange_interface():
    class Old:
        """As a tensor of an older torch."""

        def __init__(self, tensor):
            self.tensor = tensor

        def detach(self):
            return Old(self.tensor.detach())

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

    weight = torch.nn.Parameter(torch.randn(3, 5))
    layout = Layout.of([weight])
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    packs = packer(layout, [weight])
    packs.rebind([Old(weight)])
    packs.pack(buffer)
    assert torch.equal(layout.views(buffer)[0], weight)


def test_tensors_live_until_others_are_bound_and_a_call_under_way_has_ended():
    layout = Layout.of([torch.empty(1 << 20)])
    sets = [[torch.full((1 << 20,), float(value))] for value in range(2)]
    packs = packer(layout, sets[0])
    done = threading.Event()

    def rebind():
        while not done.is_set():
            for tensors in sets:
                packs.rebind([tensors[0].clone()])

    thread = threading.Thread(target=rebind)
    thread.start()
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    for _ in range(50):
        packs.pack(buffer)
        (view,) = layout.views(buffer)
        assert (view == view[0]).all() and view[0] in (0, 1)
    done.set()
    thread.join()


@pytest.mark.parametrize(
    "offset, nbytes, dtype, wire, why",
    [
        (8, 64, torch.float32, torch.float32, "must begin at a multiple of 16"),
        (64, 64, torch.float32, torch.float32, "slot 0, 12 bytes at 64, .* within the buffer's 64"),
        (0, 64, torch.int32, torch.float32, "slot 0 would cast int32 to float32"),
        (0, 64, torch.complex64, torch.complex64, "tensors of complex64 cannot be packed"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(offset, nbytes, dtype, wire, why):
    layout = Layout((Slot(offset, 12, (3,), dtype, wire),), nbytes)
    with pytest.raises(InvalidArgument, match=why):
        packer(layout, [torch.zeros(3)])
