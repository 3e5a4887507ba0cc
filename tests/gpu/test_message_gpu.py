"""Messages of CUDA tensors."""

import pytest
import torch
from message_cases import check_as_is, check_cast, check_overlaps_travel_once, check_shared, sent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_what_is_sent_arrives_as_it_is():
    check_as_is("cuda")


def test_what_shares_memory_shares_it_again():
    check_shared("cuda")
    check_overlaps_travel_once("cuda")


@pytest.mark.parametrize("wire, rounding", [(torch.bfloat16, 2.0**-8), (torch.float8_e4m3fn, 2.0**-4)], ids=str)
def test_what_is_cast_arrives_rounded(wire, rounding):
    check_cast("cuda", wire, rounding)


@pytest.mark.parametrize("magnitude", [1e-5, 1e4])
@pytest.mark.parametrize(
    "wire, rounding", [(torch.float8_e5m2, 2.0**-3), (torch.float8_e4m3fn, 2.0**-4)], ids=str
)
def test_a_first_message_has_scales_that_fit(wire, rounding, magnitude):
    tensor = magnitude * torch.randn(1000, device="cuda")
    (received,), _ = sent([tensor], wire)
    assert (received - tensor).abs().max() <= 1.5 * rounding * tensor.abs().max()
