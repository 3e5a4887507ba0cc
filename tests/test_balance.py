"""Rows divided into microbatches of even work: each row once, near the best, and trained as they are."""

import heapq
import itertools
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_same_gradients, gradients, twin
from torch import nn

import pipeline_ext as pe

FACTORS = st.sampled_from([(1.0, 0.0), (0.0, 1.0), (1.0, 0.01), (3, 2), (1e-7, 1e-9), (1e300, 1e300)])


def work(length, linear, quadratic):
    return Fraction(linear) * length + Fraction(quadratic) * length**2


def fullest(parts, lengths, linear=1, quadratic=0):
    return max(sum(work(lengths[row], linear, quadratic) for row in part) for part in parts)


def best(lengths, count, linear, quadratic):
    """The fullest microbatch of the best division, by trying all."""
    works = [work(length, linear, quadratic) for length in lengths]
    least = None
    for where in itertools.product(range(count), repeat=len(works)):
        totals = [Fraction(0)] * count
        for m, each in zip(where, works):
            totals[m] += each
        least = max(totals) if least is None else min(least, max(totals))
    return least


def longest_first(lengths, count, linear, quadratic):
    """The same of Graham's rule alone."""
    totals = [Fraction(0)] * count
    for each in sorted((work(length, linear, quadratic) for length in lengths), reverse=True):
        heapq.heapreplace(totals, totals[0] + each)
    return max(totals)


def assert_partition(parts, rows, count):
    assert len(parts) == count and all(parts)
    assert sorted(itertools.chain(*parts)) == list(range(rows))
    assert all(part == sorted(part) for part in parts)
    assert [part[0] for part in parts] == sorted(part[0] for part in parts)


@st.composite
def batches(draw, most_rows, most_count, longest):
    lengths = draw(st.lists(st.integers(0, longest), min_size=1, max_size=most_rows))
    return lengths, draw(st.integers(1, min(most_count, len(lengths))))


@given(batches(200, 40, 2**31 - 1), FACTORS)
def test_each_row_is_in_one_microbatch_none_is_empty_and_the_fullest_is_bounded(batch, factors):
    lengths, count = batch
    linear, quadratic = factors
    parts = pe.balanced_microbatches(lengths, count, linear=linear, quadratic=quadratic)
    assert_partition(parts, len(lengths), count)
    assert parts == pe.balanced_microbatches(torch.tensor(lengths), count, linear=linear, quadratic=quadratic)
    found = fullest(parts, lengths, *factors)
    works = [work(length, *factors) for length in lengths]
    # No microbatch can stay below the mean and the longest row; a list in any order is this close to both.
    assert found >= max(max(works), sum(works) / count)
    rounding = Fraction(1) + Fraction(1, 10**9)
    assert found <= (sum(works) / count + max(works) * (1 - Fraction(1, count))) * rounding
    assert found <= longest_first(lengths, count, *factors) * rounding


@given(batches(7, 3, 12), FACTORS)
def test_the_fullest_is_within_graham_s_bound_of_the_best(batch, factors):
    lengths, count = batch
    linear, quadratic = factors
    parts = pe.balanced_microbatches(lengths, count, linear=linear, quadratic=quadratic)
    bound = best(lengths, count, *factors) * (Fraction(4, 3) - Fraction(1, 3 * count))
    assert fullest(parts, lengths, *factors) <= bound * (1 + Fraction(1, 10**9))


@pytest.mark.parametrize(
    "lengths, count, found, alone",
    [
        ([3, 3, 2, 2, 2], 2, 6, 7),  # a swap
        ([5, 5, 4, 4, 3, 3, 3], 3, 9, 11),  # where longest first is at its bound
        ([8, 7, 6, 5, 4], 2, 15, 17),
    ],
)
def test_exchanges_improve_on_longest_first(lengths, count, found, alone):
    assert longest_first(lengths, count, 1, 0) == alone
    assert fullest(pe.balanced_microbatches(lengths, count), lengths) == found


def test_what_is_known():
    assert pe.balanced_microbatches([7, 1, 1, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5, 6, 7]]
    assert pe.balanced_microbatches([5, 5, 5, 5], 2) == [[0, 2], [1, 3]]
    assert pe.balanced_microbatches([0, 0, 0], 3) == [[0], [1], [2]]  # none empty, without any work
    assert pe.balanced_microbatches(range(4), 1) == [[0, 1, 2, 3]]
    assert pe.balanced_microbatches(torch.tensor([2, 9, 2], dtype=torch.int32), 2) == [[0, 2], [1]]
    # By length the first row is worth four others, by pairs of tokens sixteen.
    lengths = [4, *[1] * 16]
    assert pe.balanced_microbatches(lengths, 2)[0] == [0, 5, 7, 9, 11, 13, 15]
    assert pe.balanced_microbatches(lengths, 2, linear=0, quadratic=1) == [[0], [*range(1, 17)]]


def test_many_rows_are_even_to_a_thousandth():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randn(4096, generator=generator).exp().mul(300).long() + 1
    for count in (8, 64):
        parts = pe.balanced_microbatches(lengths, count, linear=1.0, quadratic=1e-3)
        works = lengths + 1e-3 * lengths**2
        totals = torch.stack([works[part].sum() for part in parts])
        assert totals.max() <= 1.001 * max(totals.mean(), works.max())


@pytest.mark.parametrize(
    "lengths, count, factors, said",
    [
        ([], 1, {}, r"lengths has 0 rows, too few for 1 microbatches"),
        ([3, 4], 3, {}, r"lengths has 2 rows, too few for 3 .*; give a larger batch or fewer microbatches"),
        ([3, -1], 1, {}, r"lengths\[1\] is -1; give a whole number from 0 to 2147483647"),
        ([3, math.nan], 1, {}, r"lengths\[1\] is nan; give a whole number"),
        ([2.0, 3.0], 1, {}, r"lengths\[0\] is 2\.0; give a whole number"),
        ([True, 3], 1, {}, r"lengths\[0\] is True; give a whole number"),
        ([2**31], 1, {}, r"lengths\[0\] is 2147483648; give"),
        (torch.tensor([True]), 1, {}, r"lengths\[0\] is True; give a whole number"),
        (torch.tensor([1.5]), 1, {}, r"lengths\[0\] is 1\.5; give a whole number"),
        (torch.ones(2, 2, dtype=torch.int64), 1, {}, r"lengths\[0\] is \[1, 1\]; give a whole number"),
        (torch.tensor(3), 1, {}, r"lengths is tensor\(3\); give a list of whole numbers"),
        ("123", 1, {}, r"lengths is '123'; give a list of whole numbers"),
        (7, 1, {}, r"lengths is 7; give a list of whole numbers"),
        ([3], 0, {}, r"microbatches is 0; give a whole number of at least 1"),
        ([3], True, {}, r"microbatches is True; give a whole number of at least 1"),
        ([3], 1.0, {}, r"microbatches is 1\.0; give a whole number of at least 1"),
        ([3], 1, {"linear": -1.0}, r"linear is -1\.0; give a number from 0 to"),
        ([3], 1, {"linear": math.nan}, r"linear is nan; give a number from 0 to"),
        ([3], 1, {"quadratic": math.inf}, r"quadratic is inf; give a number from 0 to"),
        ([3], 1, {"quadratic": True}, r"quadratic is True; give a number from 0 to"),
        ([3], 1, {"quadratic": "1"}, r"quadratic is '1'; give a number from 0 to"),
        ([3], 1, {"linear": 0}, r"linear and quadratic are both 0, so that no row has work; give one above 0"),
    ],
)
def test_what_cannot_be_divided_is_refused(lengths, count, factors, said):
    with pytest.raises(pe.InvalidArgument, match=said):
        pe.balanced_microbatches(lengths, count, **factors)


VOCABULARY, WIDTH, IGNORED = 11, 8, -100


class Packed(nn.Module):
    """Attention inside each of the packed rows, whose numbers of tokens stand beside the tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.qkv = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, ids, lengths):
        row = torch.arange(len(lengths)).repeat_interleave(lengths)
        q, k, v = self.qkv(self.embedding(ids)).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=row[:, None] == row)


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def in_plain_autograd(model, parts, weights):
    """The loss and the gradients of these microbatches, in this order."""
    plain, total = twin(model), 0
    for (inputs, labels), weight in zip(parts, weights):
        loss = cross_entropy(plain[1](plain[0](*inputs)), labels) * weight
        loss.backward()
        total = total + loss.detach()
    return total, gradients(plain)


def packed(rows, part):
    chosen = [rows[r] for r in part]
    return (torch.cat(chosen), torch.tensor([len(row) for row in chosen])), torch.cat(chosen)


def padded(rows, part):
    chosen = [rows[r] for r in part]
    labels = nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=IGNORED)
    return (labels.clamp(min=0),), labels


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("form", [packed, padded])
def test_a_batch_of_unequal_rows_trains_as_its_microbatches_do_and_as_the_whole(form, schedule):
    rows = [torch.randint(VOCABULARY, (n,)) for n in (9, 1, 3, 3, 12, 2, 5, 4, 1, 7)]
    parts = pe.balanced_microbatches([len(row) for row in rows], 3, quadratic=0.1)
    cut = [form(rows, part) for part in parts]
    tokens = [sum(len(rows[r]) for r in part) for part in parts]
    model = nn.Sequential(
        Packed() if form is packed else nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
    )
    loss, wanted = in_plain_autograd(model, cut, [n / sum(tokens) for n in tokens])
    whole_loss, whole = in_plain_autograd(model, [form(rows, range(len(rows)))], [1.0])
    options = (
        {} if form is packed else {"loss_weight": pe.count_not(IGNORED)}
    )  # a packed microbatch has a row a token
    with pe.Pipeline(list(model), microbatches=3, schedule=schedule, loss_fn=cross_entropy, **options) as pipe:
        found = pipe.step(arg_mbs=[inputs for inputs, _ in cut], target_mbs=[labels for _, labels in cut])
        assert torch.equal(found, loss)
        assert_same_gradients(model, wanted)
        torch.testing.assert_close(found, whole_loss)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.grad, whole[name])
