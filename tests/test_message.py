"""The results of several microbatches as one message."""

import pytest
import torch
from message_cases import (
    awkward,
    check_as_is,
    check_cast,
    check_overlaps_travel_once,
    check_shared,
    sent,
    sharing,
)

from pipeline_ext import PipelineError
from pipeline_ext.base.memory import find_regions
from pipeline_ext.transport.channel import Channel
from pipeline_ext.transport.format import AsIs
from pipeline_ext.transport.message import choose_format, prepare

ROUNDING = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float8_e4m3fn: 2.0**-4,
    torch.float8_e5m2: 2.0**-3,
}


def test_what_is_sent_arrives_as_it_is():
    check_as_is("cpu")


def test_what_shares_memory_shares_it_again():
    check_shared("cpu")
    check_overlaps_travel_once("cpu")


def test_sums_that_depend_on_alignment_are_the_same():
    """Rows of 6 floats that begin anywhere: products with them differ by the alignment of their first."""
    weight = torch.randn(6, 6)
    for offset in range(1, 30):
        x = torch.randn(7 * 6 + offset)[offset:].view(7, 6)
        (received,), _ = sent([x])
        assert torch.equal(received @ weight, x @ weight)


def test_tensors_that_share_memory_are_not_cast_apart():
    for pair in (sharing("cpu")[:2], sharing("cpu")[5:7]):
        with pytest.raises(PipelineError, match="share memory cannot travel as another type"):
            choose_format(pair, torch.bfloat16, None)
    *_, left, right = sharing("cpu")  # interleaved, but nowhere the same
    choose_format([left, right], torch.bfloat16, None)


def test_a_wire_type_that_tensors_have_already_casts_nothing():
    tensors = [torch.randn(3), torch.arange(3)]
    assert isinstance(choose_format(tensors, torch.float32, None)[0], AsIs)
    assert isinstance(choose_format([torch.arange(3)], torch.float8_e4m3fn, None)[0], AsIs)
    assert isinstance(choose_format([], torch.float8_e4m3fn, None)[0], AsIs)


@pytest.mark.parametrize("wire", list(ROUNDING), ids=str)
def test_what_is_cast_arrives_rounded(wire):
    check_cast("cpu", wire, ROUNDING[wire])


def test_only_plain_tensors_are_packed():
    for tensor in (torch.eye(3).to_sparse(), torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)):
        with pytest.raises(PipelineError, match="only plain dense tensors can; give pack=1"):
            find_regions([tensor])


def test_a_group_leaves_when_it_is_complete_in_whatever_order():
    channel = Channel(microbatches=5, pack=3, in_flight=5)
    results = [[torch.full((2,), float(m)), None, m] for m in range(5)]
    counts = []
    for m in (4, 0, 2, 3, 1):
        channel.send(m, results[m])
        counts.append(channel.sent)
    assert counts == [0, 0, 0, 1, 2]
    for m in range(5):
        tensor, nothing, number = channel.receive(m)
        assert torch.equal(tensor, results[m][0])
        assert (nothing, number) == (None, m)
        channel.release(m)


def test_a_channel_starts_afresh_after_a_step_that_failed():
    channel = Channel(microbatches=4, pack=2, in_flight=4)
    channel.send(0, [torch.zeros(3)])
    channel.end()
    channel.begin()
    channel.send(1, [torch.ones(3)])
    assert channel.sent == 0
    channel.send(0, [torch.full((3,), 2.0)])
    assert channel.sent == 1
    assert channel.receive(0)[0].tolist() == [2.0, 2.0, 2.0]
    assert channel.receive(1)[0].tolist() == [1.0, 1.0, 1.0]


def test_a_result_without_tensors_travels_too():
    channel = Channel(microbatches=2, pack=2, in_flight=2)
    channel.send(0, [None, "text"])
    channel.send(1, [None, 5])
    assert channel.receive(0) == [None, "text"]
    assert channel.receive(1) == [None, 5]


# -- a message like another


def results():
    """Of two microbatches: tensors, one of them twice, and what lies between them."""
    torch.manual_seed(0)
    x, scale = torch.randn(3, 8), torch.randn(())
    return [[x, 8, scale, "a"], [torch.randn(5, 8, requires_grad=True), None, scale, torch.arange(3)]]


def packed(leaves):
    prepared = prepare(leaves, None, None)
    buffer = torch.zeros(prepared.description.format.nbytes, dtype=torch.uint8)
    prepared.pack(buffer)
    return prepared.description, buffer


def test_a_message_like_another_is_packed_at_once_as_it_would_be_alone():
    description, _ = packed(results())
    other = results()
    other[0][0] += 1
    buffer = torch.zeros(description.format.nbytes, dtype=torch.uint8)
    assert description.pack(other, buffer)
    assert torch.equal(buffer, packed(other)[1])


def twice(leaves):
    leaves[1][2] = leaves[1][2].clone()


def one(leaves):
    leaves[0][0] = leaves[1][0][:3].detach()


DIFFERENCES = {
    "shape": lambda leaves: leaves[0].__setitem__(0, torch.randn(4, 8)),
    "type": lambda leaves: leaves[1].__setitem__(3, torch.arange(3, dtype=torch.int32)),
    "strides": lambda leaves: leaves[0].__setitem__(0, torch.randn(8, 3).t()),
    "alignment": lambda leaves: leaves[0].__setitem__(0, torch.randn(25)[1:].view(3, 8)),
    "requires_grad": lambda leaves: leaves[1].__setitem__(0, leaves[1][0].detach()),
    "class": lambda leaves: leaves[0].__setitem__(0, leaves[0][0].as_subclass(Tagged)),
    "lazily negated": lambda leaves: leaves[0].__setitem__(2, torch.randn((), dtype=torch.cfloat).conj().imag),
    "a value": lambda leaves: leaves[0].__setitem__(1, 9),
    "a value's type": lambda leaves: leaves[0].__setitem__(1, 8.0),
    "a tensor where a value was": lambda leaves: leaves[0].__setitem__(1, torch.ones(())),
    "a value where a tensor was": lambda leaves: leaves[0].__setitem__(0, None),
    "fewer leaves": lambda leaves: leaves[1].pop(),
    "fewer results": lambda leaves: leaves.pop(),
    "two tensors in place of one": twice,
    "memory that two tensors share": one,
}


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_message_that_differs_is_left_unpacked(difference):
    description, _ = packed(results())
    other = results()
    DIFFERENCES[difference](other)
    buffer = torch.zeros(description.format.nbytes, dtype=torch.uint8)
    assert not description.pack(other, buffer)
    assert not buffer.any()


@pytest.mark.parametrize("make", [awkward, sharing])
def test_what_only_the_general_way_can_pack_is_left_to_it(make):
    leaves = [make("cpu")]
    description, _ = packed(leaves)
    assert not description.pack(leaves, torch.zeros(description.format.nbytes, dtype=torch.uint8))
