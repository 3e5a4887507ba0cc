"""Which process writes which piece of a tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline_ext import InvalidArgument
from pipeline_ext.checkpoint.pieces import Box, Held, whole, writers


def rows(begin, count, of=8):
    return Held("float32", (of, 2), (begin, 0), (count, 2))


def test_what_many_hold_is_written_once_and_the_work_is_shared_out():
    everywhere = {f"w{i}": rows(0, 8) for i in range(6)}
    found = writers([everywhere, everywhere, everywhere])
    assert [next(iter(found[name].values())) for name in everywhere] == [0, 1, 2, 0, 1, 2]


def test_each_piece_is_written_by_one_that_holds_it():
    held = [{"w": rows(0, 4)}, {"w": rows(4, 4)}, {"w": rows(0, 4)}, {"w": rows(4, 4)}, {"w": rows(8, 0)}]
    assert writers(held) == {"w": {rows(0, 4).box: 0, rows(4, 4).box: 1}}


def test_who_has_the_whole_writes_it_if_others_have_pieces():
    assert writers([{"w": rows(0, 4)}, {"w": rows(0, 8)}]) == {"w": {whole((8, 2)): 1}}


@pytest.mark.parametrize(
    "held, said",
    [
        (
            [{"w": rows(0, 8)}, {"w": rows(0, 9, of=9)}],
            r"\[8, 2\] in process 0 and float32\[9, 2\] in",
        ),
        ([{}, {"w": rows(0, 4)}, {"w": rows(6, 2)}], "hold 12 of the 16 elements of 'w'"),
    ],
)
def test_pieces_that_do_not_make_a_tensor_are_refused(held, said):
    with pytest.raises(InvalidArgument, match=said):
        writers(held)


@st.composite
def boxes(draw, shape):
    begins = [draw(st.integers(0, length)) for length in shape]
    return Box(tuple(begins), tuple(draw(st.integers(0, n - begin)) for begin, n in zip(begins, shape)))


@given(
    st.lists(st.integers(0, 5), max_size=3).flatmap(
        lambda shape: st.tuples(st.just(shape), boxes(shape), boxes(shape))
    )
)
def test_what_two_boxes_have_in_common_is_what_indexing_says(found):
    shape, one, other = found
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    everything = whole(shape)
    first, second = numbers[one.slices(everything)], numbers[other.slices(everything)]
    expected = set(first.flatten().tolist()) & set(second.flatten().tolist())
    common = one.common(other)
    assert (common is None) == (not expected)
    if common is not None:
        assert torch.equal(first[common.slices(one)], second[common.slices(other)])
        assert set(numbers[common.slices(everything)].flatten().tolist()) == expected
